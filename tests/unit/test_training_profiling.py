"""Which steps are recorded, what is written of them, and where the time of a step is said to go."""

import json
import pickle

import pytest
import torch

from megatron import registry
from megatron.checkpoint.state import TrainState
from megatron.engine.training import StepOutput
from megatron.errors import RunError
from megatron.metrics.interval import log_line
from megatron.metrics.writers import MetricWriters
from megatron.training.clock import Clock
from megatron.training.hooks.base import Hook
from megatron.training.hooks.breakdown import Breakdown, Stopwatch
from megatron.training.hooks.profiling import ProfileRequest, Profiling, Recording
from megatron.training.loop import train_steps
from tests import tiny

CPU = torch.device("cpu")


class Engine:
    """Stands for the engine: a step is some twelve operators on a device, and may fail."""

    def __init__(self, fail_at: int | None = None, device: torch.device = CPU) -> None:
        self.fail_at, self.device = fail_at, device

    def train_batch(self, batch, *, step, learning_rate):
        x = torch.full((64, 64), 0.01, device=self.device, requires_grad=True)
        loss = ((x @ x).exp().softmax(-1).cumsum(0).sin() + x.tanh()).log1p().mean()
        loss.backward()
        if step == self.fail_at:
            raise RunError("no memory")
        return StepOutput(loss.detach(), torch.tensor(1.0))


def train(folder, start: int, stop: int, first: int = 0, last: int = 6, engine=None, memory: bool = True, others=()):
    engine = engine or Engine()
    recording = Recording(ProfileRequest(range(start, stop), folder, folder if memory else None), engine.device, rank=3)
    steps = range(max(start, first), min(stop, last))
    hooks: list[Hook] = [Profiling(recording, steps, first, Clock(engine.device)), *others]
    batches = iter([[]] * 100)
    return train_steps(tiny.run(engine, tiny.plan(), first, last), TrainState(first), batches, hooks, MetricWriters())


def trace(folder) -> list[dict]:
    return json.loads((folder / "trace_rank_3.json").read_text())["traceEvents"]


def steps_of(folder) -> list[str]:
    ranges = [event for event in trace(folder) if event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(ranges, key=lambda event: event["ts"])]


def rows(path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.lstrip()[:1].isdigit() and "%" in line]


def test_the_trace_has_the_chosen_steps_and_no_others(tmp_path):
    train(tmp_path, 2, 4)
    assert steps_of(tmp_path) == ["step 3", "step 4"]
    ranges = [event for event in trace(tmp_path) if event.get("name") in ("step 3", "step 4")]
    products = [event for event in trace(tmp_path) if event.get("name") == "aten::matmul"]
    assert len(products) == 2, "one in each step, and none of other steps"
    for step, product in zip(sorted(ranges, key=lambda event: event["ts"]), products, strict=True):
        assert step["ts"] <= product["ts"] <= step["ts"] + step["dur"]


@pytest.mark.parametrize(
    ("start", "stop", "first", "last", "steps"),
    [
        (0, 1, 0, 6, ["step 1"]),
        (1, 5, 2, 6, ["step 3", "step 4", "step 5"]),
        (4, 9, 0, 6, ["step 5", "step 6"]),
    ],
    ids=["from the first step", "resumed within them", "the run ends within them"],
)
def test_of_the_chosen_steps_those_that_the_run_comes_to_are_recorded(tmp_path, start, stop, first, last, steps):
    train(tmp_path, start, stop, first, last)
    assert steps_of(tmp_path) == steps


def test_tables_name_the_ten_dearest_operators_in_order(tmp_path):
    train(tmp_path, 2, 4)
    kernels, memory = rows(tmp_path / "kernels_rank_3.txt"), rows(tmp_path / "memory_rank_3.txt")
    for table in (kernels, memory):
        assert len(table) == 10
        totals = [float(row.split()[1]) for row in table]
        assert totals == sorted(totals, reverse=True)
        assert sum(float(row.split()[0].rstrip("%")) for row in table) <= 100.5
    calls = {row.split()[-1]: int(row.split()[2]) for row in memory}
    assert calls["aten::exp"] == 2, "one in each step"
    assert "step" not in calls
    assert (tmp_path / "kernels_rank_3.txt").read_text().startswith("steps 3 to 4 on rank 3: the 10 most expensive of ")


def test_memory_is_counted_for_the_operator_that_asked_for_it(tmp_path):
    train(tmp_path, 2, 3)
    names = [row.split()[-1] for row in rows(tmp_path / "memory_rank_3.txt")]
    assert not [name for name in names if name.startswith("aten::empty")]
    assert "at most 0." in (tmp_path / "memory_rank_3.txt").read_text()


def test_files_are_there_whole_or_not_at_all_and_only_those_asked_for(tmp_path):
    train(tmp_path, 2, 4, memory=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels_rank_3.txt", "trace_rank_3.json"]


def test_a_run_that_fails_within_the_steps_leaves_what_was_recorded(tmp_path):
    with pytest.raises(RunError, match="no memory"):
        train(tmp_path, 2, 6, engine=Engine(fail_at=3))
    assert steps_of(tmp_path) == ["step 3", "step 4"]


def test_a_profile_that_cannot_be_written_ends_the_run_with_its_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"the profile of steps 3 to 4 cannot be written: .*file"):
        train(tmp_path / "file", 2, 4)


def test_profiling_ends_before_other_hooks_begin_to_work():
    order = registry.names("hook")
    assert order.index("breakdown") < order.index("profiling") < order.index("metrics_log") < order.index("saving")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_table_is_of_kernels_and_memory_a_snapshot(tmp_path):
    train(tmp_path, 2, 4, engine=Engine(device=torch.device("cuda")))
    table = (tmp_path / "kernels_rank_3.txt").read_text()
    assert "kernels, by time on the GPU" in table
    assert "aten::" not in table
    assert len(rows(tmp_path / "kernels_rank_3.txt")) == 10
    snapshot = pickle.loads((tmp_path / "memory_rank_3.pickle").read_bytes())
    assert any(event["action"] == "alloc" for device in snapshot["device_traces"] for event in device)


class Ticks(Stopwatch):
    """A stopwatch whose time passes only when it is told to."""

    now = 0.0

    def _now(self) -> float:
        return self.now

    def passing(self, seconds: float):
        def wait() -> None:
            self.now += seconds

        return wait


class Validation(Hook):
    """Uses the timed forward pass after a step, as validation does."""

    def __init__(self, forward) -> None:
        self.forward = forward

    def after_step(self, step):
        self.forward()
        return {}


class Record:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, step, values):
        self.rows.append(dict(values))


def test_the_breakdown_is_the_mean_time_of_a_step_by_phases_without_validation():
    watch, record = Ticks(CPU), Record()
    forward, optimizer = watch.timed("forward", watch.passing(3)), watch.timed("optimizer", watch.passing(1))

    class Timed:
        def train_batch(self, batch, *, step, learning_rate):
            for _ in range(step + 1):
                forward()
            optimizer()
            return StepOutput(torch.tensor(1.0), torch.tensor(1.0))

    hooks = [Breakdown(2, watch), Validation(forward)]
    load = watch.passing(2)
    batches = (load() or [] for _ in range(9))
    train_steps(tiny.run(Timed(), tiny.plan(), 0, 4), TrainState(), batches, hooks, record)
    names = ("runtime/data_wait_seconds", "runtime/forward_seconds", "runtime/optimizer_seconds")
    expected = [dict(zip(names, means, strict=True)) for means in ((2, 4.5, 1), (2, 10.5, 1))]
    assert record.rows == [{}, expected[0], {}, expected[1]]


def test_the_log_line_tells_the_phases_in_the_order_of_a_step():
    metrics = {
        "runtime/iteration_time": 0.2,
        "train/lm_loss": 2.0,
        "train/learning_rate": 1e-3,
        "runtime/tokens_per_sec": 1000.0,
        "runtime/flops_per_sec_per_gpu": 1e12,
        "runtime/executed_flops_per_sec_per_gpu": 9e11,
    }
    phases = {"runtime/optimizer_seconds": 0.0151, "runtime/forward_seconds": 0.06, "runtime/data_wait_seconds": 0.0}
    assert "200 ms/step (data wait 0.0, forward 60.0, optimizer 15.1) |" in log_line(5, 10, metrics | phases, False)
    assert "200 ms/step | " in log_line(5, 10, metrics, False)
