"""Between two steps a training engine's model generates and scores under every layout, and training does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.engine.distributed import start_layout
from megatron.engine.training import TrainingEngine
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Request, Sampling
from megatron.inference import TrainedModel
from megatron.model.gpt import gpt_layers
from megatron.tokenizer.build import build_tokenizer
from tests import tiny
from tests.ranks.run import run_ranks

PROMPTS = ("hello wor", "To be, or", "xyz", "To be, or")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2 with sequence parallelism": {"tensor": 2, "sequence_parallel": True},
    "pipeline 2": {"pipe": 2},
    "ZeRO 1": {"data": 2, "zero": 1},
    "ZeRO 3": {"data": 2, "zero": 3},
    "tensor 2, ZeRO 3": {"tensor": 2, "data": 2, "zero": 3},
    "pipeline 2, replicas 2": {"pipe": 2, "data": 2},
    "recomputed and compiled": {"recompute": 1, "engine": {"compile": True, "recompute_selective": True}},
}
LONG = ("ZeRO 1", "tensor 2, ZeRO 3", "pipeline 2, replicas 2", "recomputed and compiled")


def requests() -> list[Request]:
    sampled = Sampling(temperature=1.0, top_k=40)
    texts = [Request(tuple(text.encode()), 4, seed=str(i)) for i, text in enumerate(PROMPTS)]
    texts += [Request(tuple(text.encode()), 9, sampled, seed=str(i)) for i, text in enumerate(PROMPTS)]
    return [*texts, *(Request(tuple(text.encode()), 0, score_from=2) for text in PROMPTS if len(text) > 3)]


def answers_between_steps(out: str, settings: dict[str, Any]) -> None:
    """Write what requests are answered after the second step, and the losses of three; the same losses without them."""
    tokenizer = build_tokenizer("CharLevelTokenizer")
    sizes = {"vocab_size": tokenizer.vocab_size, "padded_vocab_size": 264, "init_std": 0.4}
    plan = tiny.plan(**settings, model=sizes)
    grid = start_layout(plan.layout, None)
    losses: dict[bool, list[float]] = {}
    for asked in (False, True):
        engine = TrainingEngine(gpt_layers(plan.model, grid, 5), grid, plan)
        losses[asked] = []
        for step in range(3):
            batches = tiny.micro_batches(step, plan, grid.rank("data"))
            losses[asked].append(float(engine.train_batch(batches, step=step, learning_rate=0.001).loss))
            if asked and step == 1:
                with engine.inference() as inference:
                    model = TrainedModel(inference, inference.grid, plan, tokenizer)
                    answering = Engine(model, EngineSettings(slots=4, capacity=16, chunk=5))
                    if dist.get_rank() == 0:
                        found = answering.run(requests())
                        answering.close()
                        scores = [[token.log_probability for token in answer.scored] for answer in found]
                        texts = [[answer.ids, answer.reason] for answer in found]
                    else:
                        answering.follow()
    assert losses[True] == losses[False]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps([texts, scores, losses[True]]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    out = tmp_path_factory.mktemp("alone") / "one"
    run_ranks(1, answers_between_steps, str(out), {})
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=[pytest.mark.long] * (layout in LONG)) for layout in LAYOUTS]
)
def test_answers_between_steps_are_those_of_one_rank_and_leave_the_losses_as_they_are(tmp_path, alone, layout):
    settings = LAYOUTS[layout]
    run_ranks(tiny.ranks_of(settings), answers_between_steps, str(tmp_path / "many"), settings, timeout=240)
    texts, scores, losses = json.loads((tmp_path / "many").read_text())
    assert texts == alone[0]
    for one, other in zip(scores, alone[1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)  # the steps before have rounded in another order
    assert losses == pytest.approx(alone[2], abs=1e-5)
