"""Weights that several ranks hold are equal in every bit, and where they are not, the rank is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.config.load import config_from_flat
from megatron.errors import RunError
from megatron.events import EventLog, read_events
from megatron.training.checksums import checksum
from megatron.training.clock import Clock
from megatron.training.hooks.base import FinishedStep, Run
from megatron.training.hooks.replicas import replicas
from tests.ranks.moves import TIED, engine_of, run_steps
from tests.ranks.run import run_ranks

CONFIG = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "check_replicas_interval": 2}
# With ZeRO only the 16-bit weights are shared.
LAYOUTS: dict[str, dict[str, Any]] = {
    "bf16 dp2": {"data": 2, "precision": "bf16"},
    "zero1 dp2": {"data": 2, "zero": 1, "precision": "bf16"},
    "tp2": {"tensor": 2},
    "tied pp2": {"pipe": 2, "model": TIED},
}
MORE_LAYOUTS: dict[str, dict[str, Any]] = {
    "zero2 dp2": {"data": 2, "zero": 2, "precision": "bf16"},
    "zero1 x2 dp2": {"data": 2, "zero": 1, "precision": "bf16", "accumulation": 2},
    "fp16 dp2": {"data": 2, "precision": "fp16"},
    "tp2 sp": {"tensor": 2, "sequence_parallel": True},
    "cp2": {"context": 2},
    "tied pp2 zero1": {"pipe": 2, "zero": 1, "precision": "bf16", "model": TIED},
}


def run_of(settings: dict[str, Any], folder: Path | None = None) -> Run:
    engine, plan = engine_of(settings)
    config, absent = config_from_flat(CONFIG), None
    events = EventLog(folder if dist.get_rank() == 0 else None)
    opened: Any = (config, plan, absent, absent, engine)
    return Run(*opened, 0, 9, Clock(engine.grid.device), events=events)


def flip(tensor: torch.Tensor, place: int) -> None:
    """The lowest bit of an element."""
    bits = tensor.detach().view(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[place] ^= 1


def compare(folder: str, layouts: dict[str, dict[str, Any]]) -> None:
    """Train each layout, compare, flip a bit of a shared weight on the last rank, compare again."""
    for name, settings in layouts.items():
        own = Path(folder, name)
        own.mkdir(exist_ok=True)
        run = run_of(settings, own)
        hook = replicas(run)
        assert hook is not None, name
        state, _ = run_steps(run.engine, run.plan, TrainState(), 4)
        output: Any = None
        step = FinishedStep(state, output, 0.1, is_last=False)
        assert hook.after_step(step) == {}, name
        weights = {weight.global_name: weight for weight in run.engine.weights}
        shared = "embedding.weight" if name.startswith("tied") else "final_norm.weight"
        if dist.get_rank() == 1:
            flip(weights[shared], 3)
        assert hook.after_step(FinishedStep(TrainState(5), output, 0.1, is_last=False)) == {}, "it is not due"
        with pytest.raises(RunError, match=r"replicas differ after step 4: .*rank 1") as error:
            hook.after_step(step)
        assert shared in str(error.value), (name, str(error.value))


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.long)])
def test_what_ranks_share_is_equal_until_a_bit_is_flipped(layouts, tmp_path):
    run_ranks(2, compare, str(tmp_path), layouts, timeout=200)
    for name in layouts:
        (event,) = read_events(tmp_path / name)
        assert event.kind == "replicas_differ" and event.details["ranks"] == [0, 1], "of two it cannot be told which"
        assert len(event.details["tensors"]) == 1, "moments and masters were left as they are"


def third_of_three() -> None:
    run = run_of({"data": 2, "context": 2, "precision": "bf16"})
    hook = replicas(run)
    assert hook is not None
    state, _ = run_steps(run.engine, run.plan, TrainState(), 2)
    if dist.get_rank() == 2:
        (moment,) = (f.tensors["exp_avg"] for f in run.engine.state.fragments() if f.parameter.global_name == WEIGHT)
        flip(moment, 7)
    output: Any = None
    with pytest.raises(RunError) as error:
        hook.after_step(FinishedStep(state, output, 0.1, is_last=False))
    assert f"{WEIGHT}/exp_avg on rank 2 (" in str(error.value)
    assert "differs from ranks 0, 1, 3, which agree" in str(error.value)


WEIGHT = "blocks.1.mlp.up.weight"


@pytest.mark.long
def test_the_majority_names_the_rank_and_moments_are_compared_too():
    run_ranks(4, third_of_three)


def nothing_in_common() -> None:
    assert replicas(run_of({"pipe": 2})) is None


def test_ranks_without_common_weights_have_nothing_to_compare():
    run_ranks(2, nothing_in_common)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_checksum_changes_with_any_bit_and_with_the_order(kind, monkeypatch):
    monkeypatch.setattr("megatron.training.checksums._AT_ONCE", 7)
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).to(kind)
    known = {int(checksum(tensor))}
    for place in range(tensor.numel()):
        for bit in range(8 * tensor.element_size()):
            other = tensor.clone()
            bits = other.view(-1).view({2: torch.int16, 4: torch.int32}[other.element_size()])
            bits[place] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(bits.dtype)
            known.add(int(checksum(other)))
    known.add(int(checksum(tensor.flip(0))))
    assert len(known) == 2 + 8 * tensor.element_size() * tensor.numel()
