"""A profiled and timed run trains to the same bits, with a pipeline and without, and every rank has its files."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.engine.distributed import start
from megatron.engine.training import TrainingEngine
from megatron.metrics.writers import MetricWriters
from megatron.model.gpt import gpt_layers
from megatron.training.clock import Clock
from megatron.training.hooks.base import Hook
from megatron.training.hooks.breakdown import Breakdown, Stopwatch
from megatron.training.hooks.profiling import ProfileRequest, Profiling, Recording
from megatron.training.loop import train_steps
from tests import tiny
from tests.ranks.run import deterministic_on_gpu, run_ranks

STEPS = 4


class Losses(Hook):
    def __init__(self) -> None:
        self.values: list[float] = []
        self.phases: list[str] = []

    def after_step(self, step):
        self.values.append(float(step.output.loss))
        self.phases = sorted(step.metrics)
        return {}


def trained(layout: dict, folder: Path | None) -> Losses:
    """Train a few steps, recorded and timed where there is a `folder`."""
    deterministic_on_gpu()
    plan = tiny.plan(**layout)
    grid = start(plan.layout.pipe, plan.layout.tensor)
    engine = TrainingEngine(gpt_layers(plan.model, grid, 5), grid, plan)
    losses = Losses()
    hooks: list[Hook] = [losses]
    if folder is not None:
        watch = Stopwatch(grid.device)
        engine.time_phases(watch.timed)
        recording = Recording(ProfileRequest(range(1, 3), folder, folder), grid.device, dist.get_rank())
        hooks = [Breakdown(1, watch), Profiling(recording, range(1, 3), 0, Clock(grid.device)), losses]
    batches = (tiny.micro_batches(step, plan, grid.rank("data")) for step in range(STEPS))
    train_steps(tiny.run(engine, plan, 0, STEPS), TrainState(), batches, hooks, MetricWriters())
    return losses


def check(folder: Path, layout: dict) -> None:
    plain, watched = trained(layout, None), trained(layout, folder)
    assert watched.values == plain.values, "the same bits"
    phases = ["backward", "data_wait", "forward", "optimizer", *(["pipeline_exchange"] if "pipe" in layout else [])]
    assert watched.phases == [f"runtime/{phase}_seconds" for phase in phases]
    events = json.loads((folder / f"trace_rank_{dist.get_rank()}.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event.get("cat") == "user_annotation"} >= {"step 2", "step 3"}
    assert "step 4" not in {event["name"] for event in events}


@pytest.mark.parametrize(
    "layout",
    [
        {"pipe": 2, "accumulation": 2},
        pytest.param({"data": 2, "zero": 3, "precision": "bf16"}, marks=pytest.mark.long),
        pytest.param({"tensor": 2, "engine": {"compile": True}}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_what_is_profiled_and_timed_trains_to_the_same_bits(tmp_path, layout):
    run_ranks(2, check, tmp_path, layout, timeout=180)
    assert len(list(tmp_path.glob("*_rank_*"))) == 2 * 3
