"""When hooks act, what they tell, and when a run ends."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron import registry
from megatron.checkpoint.state import TrainState
from megatron.config.flops import TokenFlops
from megatron.config.plan import SchedulePlan
from megatron.engine.training import StepOutput
from megatron.errors import RunError
from megatron.metrics.interval import Workload
from megatron.training.clock import Clock
from megatron.training.hooks.base import FinishedStep, Hook
from megatron.training.hooks.divergence import Divergence
from megatron.training.hooks.metrics_log import MetricsLog, mean_loss
from megatron.training.loop import final_step, train_steps
from tests import tiny

WORK = Workload(100, 4, TokenFlops(1e6, 8e5), ranks=1, peak_flops=None)


def finished(step: int, loss: float = 1.0, norm: float = 1.0, skipped: bool = False, last: bool = False):
    found = torch.tensor(math.inf if skipped else norm)
    return FinishedStep(TrainState(step), StepOutput(torch.tensor(loss), found), 1e-3, last)


def clock() -> Clock:
    return Clock(torch.device("cpu"))


@pytest.mark.parametrize(
    ("done", "iterations", "exit_interval", "last"),
    [(0, 20, None, 20), (0, 20, 8, 8), (8, 20, 8, 16), (16, 20, 8, 20), (9, 20, 8, 16), (20, 20, 8, 20)],
)
def test_a_run_ends_at_train_iters_or_at_the_next_multiple_of_exit_interval(done, iterations, exit_interval, last):
    assert final_step(done, iterations, exit_interval) == last


def test_the_report_is_the_mean_of_the_interval_and_of_nothing_before_it():
    report = MetricsLog(2, 6, WORK, clock())
    losses = [report.after_step(finished(step, loss)).get("train/lm_loss") for step, loss in enumerate([8, 6, 3, 5], 1)]
    assert losses == [None, 7.0, None, 4.0]


def test_steps_that_a_run_has_gone_back_from_are_in_no_report():
    report = MetricsLog(2, 6, WORK, clock())
    report.after_step(finished(3, 8.0))
    report.rewound(TrainState(1))
    assert report.after_step(finished(2, 6.0))["train/lm_loss"] == 6.0


def test_with_an_interval_of_one_every_step_reports_its_own_loss():
    report = MetricsLog(1, 6, WORK, clock())
    assert [report.after_step(finished(step, loss))["train/lm_loss"] for step, loss in ((1, 8.0), (2, 6.0))] == [8, 6]


def test_the_last_step_of_a_run_is_reported_wherever_it_falls():
    report = MetricsLog(100, 100, WORK, clock())
    assert report.after_step(finished(7, 3.0, last=True))["train/lm_loss"] == 3.0


def test_a_loss_that_is_no_number_shows_in_the_mean():
    assert math.isnan(mean_loss([1.0, math.nan, 3.0], [False, False, False]))
    assert math.isinf(mean_loss([1.0, math.inf], [False, False]))


def test_only_the_infinite_loss_of_a_skipped_step_is_left_out_and_counted():
    assert mean_loss([1.0, math.inf, 3.0], [False, True, False]) == 2.0
    assert mean_loss([1.0, 5.0], [False, True]) == 3.0
    assert math.isnan(mean_loss([math.inf], [True]))
    report = MetricsLog(2, 6, WORK, clock())
    report.after_step(finished(1, 4.0))
    metrics = report.after_step(finished(2, math.inf, skipped=True))
    assert metrics["train/skipped_steps"] == 1
    assert metrics["train/lm_loss"] == 4.0
    assert "train/grad_norm" not in metrics


def test_one_bad_batch_is_passed_over_and_too_many_in_a_row_end_the_run():
    hook = Divergence(patience=3)
    for number, skipped in enumerate([True, True, False, True, True], 1):
        assert hook.after_step(finished(number, math.nan if skipped else 1.0, skipped=skipped)) == {}
    assert hook.after_step(finished(6, math.nan, skipped=True)) == {}, "it is judged when the next step is under way"
    with pytest.raises(RunError, match=r"diverged: the gradients of 3 steps in a row, up to step 6,.*loss nan"):
        hook.after_step(finished(7))


def test_the_last_step_of_a_run_is_judged_at_once():
    hook = Divergence(patience=2)
    hook.after_step(finished(1, skipped=True))
    with pytest.raises(RunError, match=r"2 steps in a row, up to step 2,"):
        hook.after_step(finished(2, skipped=True, last=True))


def scaled(number: int, scale: float, skipped: bool = True) -> FinishedStep:
    norm = torch.tensor(math.inf if skipped else 1.0)
    return FinishedStep(TrainState(number), StepOutput(torch.tensor(math.inf), norm, scale), 1e-3, False)


def test_a_loss_scale_may_fall_for_long_and_at_its_lowest_patience_is_as_ever():
    hook = Divergence(patience=3, lowest_scale=1.0)
    for number, scale in enumerate([16, 8, 4, 2, 1, 1], 1):
        hook.after_step(scaled(number, scale))
    hook.after_step(scaled(7, 1, skipped=False))
    for number in (8, 9, 10):
        hook.after_step(scaled(number, 1))
    with pytest.raises(RunError, match=r"of 3 steps in a row, up to step 10,.*loss scale 1, which is its lowest\)"):
        hook.after_step(scaled(11, 1))


def test_a_loss_scale_does_not_fall_for_ever():
    hook = Divergence(patience=3, lowest_scale=1.0)
    with pytest.raises(RunError, match=r"of 100 steps in a row,.*loss scale 2\)"):
        for number in range(101):
            hook.after_step(scaled(number, 2))


def test_a_run_that_has_diverged_is_not_saved_once_more():
    order = registry.names("hook")
    assert order.index("metrics_log") < order.index("divergence") < order.index("saving")


def test_every_hook_in_the_registry_is_there():
    for name in registry.names("hook"):
        assert callable(registry.resolve("hook", name))


def test_pauses_do_not_count_as_training_time(monkeypatch):
    now = 10.0
    monkeypatch.setattr("megatron.training.clock.time", SimpleNamespace(perf_counter=lambda: now))
    watch = clock()
    now += 1
    with watch.paused():
        now += 50
    now += 2
    assert watch.lap() == 3
    now += 4
    assert watch.lap() == 4


class Engine:
    """Stands for the engine where only the loop's own bookkeeping is looked at."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float, str]] = []

    def train_batch(self, batch, *, step, learning_rate):
        self.calls.append((step, learning_rate, batch))
        return StepOutput(torch.tensor(float(step)), torch.tensor(1.0))


class Watcher(Hook):
    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[tuple[int, int, bool]] = []
        self.closed = 0
        self._fail_at = fail_at

    def after_step(self, step):
        self.seen.append((step.state.step, step.state.consumed_samples, step.is_last))
        if step.state.step == self._fail_at:
            raise RunError("enough")
        return {"train/lm_loss": float(step.output.loss)} if step.state.step % 2 == 0 else {}

    def close(self) -> None:
        self.closed += 1


class Record:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict]] = []

    def write(self, step, values):
        self.rows.append((step, dict(values)))


def run_loop(engine, hooks, writers, start: TrainState, last: int) -> TrainState:
    batches = (f"batch {number}" for number in range(100))
    plan = replace(tiny.plan(), schedule=SchedulePlan("constant", 1.0, 1.0, warmup_steps=9, decay_steps=20))
    return train_steps(tiny.run(engine, plan, start.step, last), start, batches, hooks, writers)


def test_the_loop_counts_steps_samples_and_tokens_and_asks_for_the_rate_of_each_step():
    engine, watcher, record = Engine(), Watcher(), Record()
    state = run_loop(engine, [watcher], record, TrainState(2, 16, 256), 4)
    assert engine.calls == [(2, 0.3, "batch 0"), (3, 0.4, "batch 1")]
    assert state == TrainState(4, 32, 512)
    assert watcher.seen == [(3, 24, False), (4, 32, True)]
    assert record.rows == [(3, {}), (4, {"train/lm_loss": 3.0})]
    assert watcher.closed == 1


def test_a_run_that_has_reached_its_end_trains_no_further():
    engine = Engine()
    assert run_loop(engine, [Watcher()], Record(), TrainState(4, 32, 512), 4) == TrainState(4, 32, 512)
    assert engine.calls == []


def test_hooks_are_closed_when_a_run_fails():
    watchers = [Watcher(), Watcher(fail_at=2)]
    with pytest.raises(RunError):
        run_loop(Engine(), watchers, Record(), TrainState(), 4)
    assert [watcher.closed for watcher in watchers] == [1, 1]
