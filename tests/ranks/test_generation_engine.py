"""The decoding engine gives the same answers on one rank, on tensor-parallel ranks, in a pipeline and on replicas."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.engine.distributed import start
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Answer, Request, Sampling
from tests.ranks.run import run_ranks
from tests.trained import trained_model

PROMPTS = ("a", "hello wor", "To be, or", "xyz", "hello world", "q", "To be, or")
SETTINGS = EngineSettings(slots=4, capacity=16, chunk=5)
LAYOUTS = {"tensor 2": (1, 2, 2), "pipeline 2": (2, 1, 2), "replicas 2": (1, 1, 2), "pipeline 2 x tensor 2": (2, 2, 4)}


def requests() -> list[Request]:
    sampled = Sampling(temperature=1.0, top_k=40, top_p=0.95)
    # some texts grow beyond the context, from where on each token is computed from a whole text that is read again
    texts = [Request(tuple(text.encode()), 6, seed=str(i)) for i, text in enumerate(PROMPTS)]
    texts += [Request(tuple(text.encode()), 10, sampled, seed=str(i)) for i, text in enumerate(PROMPTS)]
    scored = [Request(tuple(text.encode()), 0, score_from=2) for text in PROMPTS if len(text) > 2]
    return [*texts, *scored]


def shown(answers: list[Answer]) -> list[object]:
    """Texts, and log-probabilities to three digits, as layouts add in other orders, which changes them by 1e-6."""
    return [
        [answer.ids, answer.text, answer.reason, [round(token.log_probability, 3) for token in answer.scored]]
        for answer in answers
    ]


def answer_all(out: str, pipe: int, tensor: int) -> None:
    engine = Engine(trained_model(start(pipe, tensor)), SETTINGS)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps([shown(engine.run(requests())), shown(engine.run(requests()[:3]))]))
        engine.close()
    else:
        engine.follow()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("alone") / "one"
    run_ranks(1, answer_all, str(out), 1, 1)
    return out.read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_answers_of_one_rank(tmp_path, alone, layout):
    pipe, tensor, world = LAYOUTS[layout]
    run_ranks(world, answer_all, str(tmp_path / "many"), pipe, tensor)
    assert json.loads((tmp_path / "many").read_text()) == json.loads(alone)
