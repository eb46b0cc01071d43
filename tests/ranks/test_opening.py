"""A checkpoint is opened for inference under any layout, whatever the one it was trained in."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter
from megatron.config.load import config_from_flat
from megatron.inference import find_trained_model, open_trained_model
from megatron.training.identity import identity_of
from megatron.training.run import prepare, set_up
from tests.ranks.run import run_ranks

SETTINGS = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "tokenizer_type": "CharLevelTokenizer",
    "data_impl": "mock",
    "train_batch_size": 8,
    "train_iters": 20,
}
TIED = {"untied": {"no_weight_tying": True}, "tied": {"no_weight_tying": False}}


def save_all(folder: str) -> None:
    for kind, settings in TIED.items():
        save(f"{folder}/{kind}", settings)


def save(folder: str, settings: dict) -> None:
    config = config_from_flat(SETTINGS | settings | {"save": folder})
    prepared = prepare(config, 1)
    run, _ = set_up(config, prepared)
    identity = identity_of(prepared.tokenizer, config.data)
    CheckpointWriter(run.engine, Path(folder), config.to_flat(), identity=identity).save(TrainState(step=1))


def compute(folder: str, settings: dict, out: str) -> None:
    config = config_from_flat(SETTINGS | settings | {"load": folder})
    model = open_trained_model(find_trained_model(config), None)
    assert model.grid.size("pipe") == settings.get("pipe_parallel_size", 1)
    tokens = torch.arange(20).view(2, 10)
    hidden, logits = model.hidden(tokens), torch.zeros(2, 10, model.plan.model.vocab_size)
    if model.grid.is_last_stage:
        logits = model.logits_of(hidden)
    logits = model.from_last_stage(logits)
    if dist.get_rank() == 0:
        torch.save(logits, out)


def compute_all(folder: str, layout: dict, out: str) -> None:
    for kind, settings in TIED.items():
        compute(f"{folder}/{kind}", settings | layout, f"{out} {kind}")


LAYOUTS = {
    "one": (1, {}),
    "two": (2, {"pipe_parallel_size": 2}),
    "four": (4, {"pipe_parallel_size": 2, "model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def logits(tmp_path_factory) -> dict[str, torch.Tensor]:
    """By layout and kind of model, such as "two tied"."""
    folder = tmp_path_factory.mktemp("opening")
    run_ranks(1, save_all, str(folder))
    for name, (world, layout) in LAYOUTS.items():
        run_ranks(world, compute_all, str(folder), layout, str(folder / name))
    return {f"{name} {kind}": torch.load(folder / f"{name} {kind}") for name in LAYOUTS for kind in TIED}


@pytest.mark.parametrize("kind", TIED)
def test_stages_and_tensor_shards_give_the_logits_of_one_rank(logits, kind):
    for name in ("two", "four"):
        # fp32 sums in another order
        torch.testing.assert_close(logits[f"{name} {kind}"], logits[f"one {kind}"], rtol=1e-4, atol=1e-5)
