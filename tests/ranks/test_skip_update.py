"""An update from unusually large gradients is skipped by every kind of engine, and nothing else changes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.engine.clipping import SKIPPED_IN_A_ROW, NormLimit
from megatron.engine.training import StepOutput, TrainingEngine
from megatron.events import EventLog, read_events
from megatron.training.checksums import checksum
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.skipped_updates import SkippedUpdates
from tests import tiny
from tests.ranks.moves import SGD, engine_of, run_steps
from tests.ranks.run import run_ranks

WINDOW = 16
TWO_LAYERS = {"num_layers": 2, "attention_kinds": ("global",) * 2}
# one of each way in which an update is made
KINDS: dict[str, dict[str, Any]] = {
    "bf16 zero1": {"data": 2, "zero": 1, "precision": "bf16"},
    "bf16 zero3 in parts": {"data": 2, "zero": 3, "precision": "bf16", "zero_options": {"sub_group_size": 1000}},
    "bf16": {"data": 2, "precision": "bf16"},
}
MORE_KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"tensor": 2},
    "fp32 sgd": {"tensor": 2, "optimizer": SGD},  # the host decides
    "fp32 pipeline": {"pipe": 2, "accumulation": 2},
    "bf16 pipeline zero1": {"pipe": 2, "zero": 1, "accumulation": 2, "precision": "bf16"},
    "bf16 zero1 summed": {"data": 2, "zero": 1, "accumulation": 2, "precision": "bf16"},
    "bf16 zero2": {"data": 2, "zero": 2, "precision": "bf16"},
    "fp16": {"data": 2, "precision": "fp16"},
    "fp16 zero3": {"data": 2, "zero": 3, "precision": "fp16"},
    "bf16 offloaded": {
        "data": 2, "zero": 2, "precision": "bf16", "zero_options": {"offload_optimizer": {"device": "cpu"}},
    },
}  # fmt: skip


def take(engine: TrainingEngine, plan: Any, step: int, factor: float = 1.0) -> StepOutput:
    """A step whose loss counts `factor` times, and so do its gradients."""
    batch = [
        (tokens, (labels, weights * factor))
        for tokens, (labels, weights) in tiny.micro_batches(step, plan, engine.grid.rank("data"))
    ]
    return engine.train_batch(batch, step=step, learning_rate=1e-3)


def state_of(engine: TrainingEngine) -> list[int]:
    """A checksum of each part of the state on this rank."""
    return [int(checksum(part)) for found in engine.state.fragments() for part in found.tensors.values()]


def skips(kinds: dict[str, dict[str, Any]]) -> None:
    for name, settings in kinds.items():
        chosen = {"skip_update": 20.0, "skip_update_window": WINDOW}
        options = {"model": TWO_LAYERS} | settings | {"optimizer": settings.get("optimizer", {}) | chosen}
        engine, plan = engine_of(options)
        run_steps(engine, plan, TrainState(), WINDOW)
        before, updates = state_of(engine), engine.state.updates
        output = take(engine, plan, WINDOW, factor=50.0)
        limit = output.norm_limit
        assert limit is not None
        assert output.norm.isfinite() and output.norm > limit, name
        assert state_of(engine) == before, name
        assert engine.state.updates == updates, name
        limits: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(limits, float(limit))
        assert len(set(limits)) == 1, "all ranks decide alike"
        output = take(engine, plan, WINDOW)
        assert output.norm_limit is not None and output.norm <= output.norm_limit, name
        assert state_of(engine) != before, "the next update is made"
        known = engine.gradient_norms
        assert (len(known["norms"]), known["skipped_in_a_row"]) == (WINDOW, 0), (name, known, output)
        engine.gradient_norms = {"norms": known["norms"][:3], "skipped_in_a_row": 2}
        assert engine.gradient_norms == {"norms": known["norms"][:3], "skipped_in_a_row": 2}


@pytest.mark.parametrize("kinds", [KINDS, pytest.param(MORE_KINDS, marks=pytest.mark.long)])
def test_an_update_from_large_gradients_is_skipped(kinds):
    run_ranks(2, skips, kinds, timeout=200)


def norms(limit: NormLimit, values: list[float]) -> list[bool]:
    """Which of the updates with these norms are skipped."""
    skipped = []
    for value in values:
        limit.begin_step()
        limit.judge(torch.tensor(value))
        limit.judge(torch.tensor(value))  # the second group of weights of the same step
        skipped.append(value > float(limit.value))
    return skipped


def test_the_limit_is_deviations_above_the_median_of_the_norms_before():
    limit = NormLimit(3.0, 8, torch.device("cpu"))
    assert norms(limit, [1.0, 1.2, 0.8, 100.0]) == [False] * 4, "half of the window is not there yet"
    assert norms(limit, [1.1]) == [False]
    # the lower median of 0.8, 1.0, 1.1, 1.2, 100 is 1.1, and that of their distances from it 0.1
    norms(limit, [1.0])
    assert float(limit.value) == pytest.approx(1.1 + 3 * 1.4826 * 0.1)
    assert norms(limit, [1.7, 1.05, float("inf"), float("nan"), 1.0]) == [True, False, True, False, False]


def test_after_some_skipped_updates_in_a_row_their_norms_are_the_new_level():
    limit = NormLimit(3.0, 8, torch.device("cpu"))
    norms(limit, [1.0, 1.1, 0.9, 1.0, 1.2, 0.8])
    assert norms(limit, [9.0] * (SKIPPED_IN_A_ROW + 3)) == [True] * SKIPPED_IN_A_ROW + [False] * 3


def test_a_skipped_update_is_recorded_and_one_with_infinite_gradients_is_not(tmp_path):
    hook = SkippedUpdates(6.0, 2, EventLog(tmp_path))
    told = []
    for number, norm in enumerate([1.0, 9.0, float("inf"), 1.0], 1):
        output = StepOutput(torch.tensor(2.0), torch.tensor(norm), None, torch.tensor(5.0))
        told.append(hook.after_step(FinishedStep(TrainState(number), output, 1e-3, is_last=number == 4)))
    assert told == [{}, {"train/skipped_updates": 0}, {}, {"train/skipped_updates": 1}]
    (event,) = read_events(tmp_path)
    assert (event.kind, event.step) == ("skipped_update", 2)
    assert "gradient norm, 9, is above 5, which is 6 deviations above the median" in event.text
