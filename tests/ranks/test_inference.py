"""Generation and evaluation give the same on one rank, on two tensor-parallel ranks and on two replicas."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron.config.schema.generation_keys import AnswerKeys
from megatron.config.schema.run_keys import TokenizerKeys
from megatron.data.mock import MockStream
from megatron.engine.distributed import start
from megatron.evaluation.perplexity import WindowSettings, negative_log_likelihood
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.prompts import Prompt
from megatron.generation.records import SamplesFile
from megatron.generation.run import Job, write_samples
from megatron.generation.samples import SampleMaker
from tests.ranks.run import run_ranks
from tests.trained import trained_model

TEXTS = ("a", "hello wor", "To be, or", "xyz", "q")
LAYOUTS = pytest.mark.parametrize("tensor", [2, 1], ids=["tensor-parallel", "two replicas"])


def generate(folder: str, tensor: int, keys: dict) -> None:
    model = trained_model(start(tensor=tensor))
    engine = Engine(model, EngineSettings(2, model.context))
    if dist.get_rank() != 0:
        return engine.follow()
    settings = AnswerKeys(maximum_tokens=10, **keys)
    maker = SampleMaker(model.tokenizer, model.context, seed=1, keys=TokenizerKeys())
    samples = maker.samples([Prompt("", settings, text) for text in TEXTS])
    identities = [sample.identity("") for sample in samples]
    with SamplesFile(Path(folder) / "out.txt", identities) as output:
        write_samples(engine, Job(samples, identities, output, model.tokenizer))
    engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where what one rank gives lies, for all layouts."""
    return tmp_path_factory.mktemp("one")


def texts(folder: Path, world: int, tensor: int, keys: dict) -> list[tuple[str, str]]:
    if not folder.exists():
        folder.mkdir()
        run_ranks(world, generate, str(folder), tensor, keys)
    rows = [json.loads(line) for line in (folder / "out.txt").read_text().splitlines()]
    return [(row["context"], row["text"]) for row in rows]


@LAYOUTS
@pytest.mark.parametrize("keys", [{}, {"temperature": 1.0, "top_k": 40, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_every_layout_writes_the_same_texts_in_order(tmp_path, folder, tensor, keys):
    alone = texts(folder / ("sampled" if keys else "greedy"), 1, 1, keys)
    assert texts(tmp_path / "two", 2, tensor, keys) == alone
    assert [context for context, _ in alone] == list(TEXTS)


def score(out: str, tensor: int) -> None:
    model = trained_model(start(tensor=tensor))
    stream = MockStream("valid", 1003, 200, seed=1)
    nats = negative_log_likelihood(model, stream, WindowSettings(labels=16, stride=16, batch=3))
    Path(f"{out}.{dist.get_rank()}").write_text(str(nats))


@LAYOUTS
def test_every_layout_finds_the_same_likelihood_on_every_rank(tmp_path, folder, tensor):
    if not (folder / "scores.0").exists():
        run_ranks(1, score, str(folder / "scores"), 1)
    run_ranks(2, score, str(tmp_path / "two"), tensor)
    alone = float((folder / "scores.0").read_text())
    assert np.isfinite(alone)
    both = [float((tmp_path / f"two.{rank}").read_text()) for rank in range(2)]
    assert both == pytest.approx([alone, alone], rel=1e-5)
