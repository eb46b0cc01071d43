"""Validation: always the same samples, each once, a mean over their labels, the same under every layout."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.data.mock import MockStream
from megatron.data.windows import Windows
from megatron.engine.distributed import start
from megatron.engine.training import StepOutput, TrainingEngine
from megatron.model.gpt import gpt_layers
from megatron.training.batch import BatchBuilder
from megatron.training.clock import Clock
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.validation import Validation
from tests import tiny
from tests.ranks.run import run_ranks

END = 3  # a token whose successor does not count


class Source(Windows):
    """Samples that remember that they were read."""

    def __getitem__(self, sample: int):
        self.__dict__.setdefault("read", []).append(sample)
        return super().__getitem__(sample)


def source(samples: int) -> Source:
    stream = MockStream("valid", samples * tiny.SEQUENCE + 1, tiny.MODEL.vocab_size, seed=1)
    return Source(stream, tiny.SEQUENCE, seed=1, shuffle=False)


def validation(samples: Source, layout: dict, masked: int | None = None, max_batches: int = 100) -> Validation:
    plan = tiny.plan(**layout)
    grid = start(plan.layout.pipe, plan.layout.tensor)
    engine = TrainingEngine(gpt_layers(plan.model, grid, 5), grid, plan)
    return Validation(engine, samples, BatchBuilder(grid, masked), plan.batch, 10, max_batches, Clock(grid.device))


def one_by_one(hook: Validation, samples: Source, count: int, masked: int | None) -> float:
    """The mean over labels of the first `count` samples, each in a batch of its own."""
    builder = BatchBuilder(hook._engine.grid, masked)
    total = labels = 0.0
    for sample in range(count):
        batches, kept = builder.build([torch.as_tensor(samples[sample])[None]])
        total += float(hook._engine.evaluate_batch(batches)) * kept
        labels += kept
    return total / labels


def check_small_part(masked: int | None) -> None:
    samples = source(11)
    hook = validation(samples, {"accumulation": 2}, masked)
    loss = hook.loss()
    assert set(samples.read) == set(range(11))
    assert loss == pytest.approx(one_by_one(hook, samples, 11, masked), rel=1e-5)


@pytest.mark.parametrize("masked", [None, END])
def test_a_small_part_is_read_whole_and_each_of_its_labels_counts_once(masked):
    run_ranks(1, check_small_part, masked)


def check_large_part() -> None:
    samples = source(1000)
    hook = validation(samples, {}, max_batches=2)
    first = hook.loss()
    assert samples.read == list(range(2 * tiny.GLOBAL_BATCH))
    assert hook.loss() == first
    assert first == pytest.approx(one_by_one(hook, samples, 2 * tiny.GLOBAL_BATCH, None), rel=1e-5)


def test_of_a_large_part_the_first_batches_are_taken_every_time():
    run_ranks(1, check_large_part)


def check_when_due() -> None:
    hook = validation(source(3), {})
    output = StepOutput(torch.tensor(1.0), torch.tensor(1.0))

    def due(step: int, last: bool = False) -> bool:
        return "validation/lm_loss" in hook.after_step(FinishedStep(TrainState(step), output, 0.1, last))

    assert [due(9), due(10), due(11), due(11, last=True), due(20)] == [False, True, False, True, True]


def test_it_is_due_at_its_interval_and_at_the_end():
    run_ranks(1, check_when_due)


def write_loss(out: str, layout: dict) -> None:
    loss = validation(source(11), layout, END).loss()
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(loss))


def losses(folder: Path, layout: dict) -> list[float]:
    world = layout.get("pipe", 1) * layout.get("tensor", 1) * layout.get("data", 1)
    run_ranks(world, write_loss, str(folder / "loss"), layout)
    return [json.loads((folder / f"loss.{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize(
    "layout",
    [{"data": 2}, {"data": 2, "zero": 3, "accumulation": 2}, {"tensor": 2}, {"pipe": 2, "accumulation": 4}],
    ids=lambda layout: "-".join(f"{key}{value}" for key, value in layout.items()),
)
def test_the_loss_does_not_depend_on_the_layout_and_is_known_on_every_rank(tmp_path, layout):
    [alone] = losses(tmp_path, {})
    assert losses(tmp_path, layout) == pytest.approx([alone] * 2, rel=1e-5)


def count_labels(masked_on_rank_1: bool) -> None:
    """Two replicas whose samples lose unlike numbers of labels."""
    grid = start()
    ids = torch.full((1, 5), END if masked_on_rank_1 and dist.get_rank() == 1 else 1)
    [(_, (_, weights))], count = BatchBuilder(grid, END).build([ids])
    assert count == (4 if masked_on_rank_1 else 8)
    total = weights.sum().to(grid.device)
    dist.all_reduce(total)
    assert abs(float(total) - 2) < 1e-6


@pytest.mark.parametrize("masked", [False, True])
def test_the_labels_of_all_replicas_are_counted_before_they_are_weighed(masked):
    run_ranks(2, count_labels, masked)
