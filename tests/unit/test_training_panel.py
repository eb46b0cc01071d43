"""What the panel of a run says, at the widths of small and large windows."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

from megatron.events import EventLog
from megatron.training import liveness as liveness_module
from megatron.training import panel as panel_module
from megatron.training.hooks.panel import memory_of
from megatron.training.liveness import Liveness
from megatron.training.panel import Panel, Trend, sparkline

METRICS = {
    "train/lm_loss": 3.2142,
    "train/learning_rate": 5.9e-4,
    "train/grad_norm": 0.831,
    "runtime/iteration_time": 0.4,
    "runtime/tokens_per_sec": 39832.0,
    "runtime/flops_per_sec_per_gpu": 1.714e14,
    "runtime/model_flops_utilization": 0.431,
}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    now = SimpleNamespace(seconds=1_000_000.0)
    stopped = SimpleNamespace(
        monotonic=lambda: now.seconds, time=lambda: now.seconds, localtime=time.gmtime, strftime=time.strftime
    )
    for module in (panel_module, liveness_module):
        monkeypatch.setattr(module, "time", stopped)
    monkeypatch.setattr("megatron.events.time", stopped)
    return now


def view(liveness: Liveness, **options) -> Panel:
    return Panel(1000, 2000, liveness, lambda: "61.2 GB of 80.0 GB", **options)


def told(panel: Panel, columns: int = 79) -> list[str]:
    return [line.plain.rstrip() for line in panel.lines(columns)]


def trained(clock, columns: int, **options) -> list[str]:
    """The panel of a run after 200 steps of 0.4 s, with a validation and a checkpoint."""
    liveness = Liveness()
    panel, events = view(liveness, **options), EventLog()
    events.listen(panel.note)
    for step in range(1001, 1201):
        liveness.begin("data loading")
        clock.seconds += 0.1
        liveness.begin("training step")
        clock.seconds += 0.3
        liveness.begin("after the step")
        loss = 2 + 10 / (step - 1000)
        metrics = METRICS | {"train/lm_loss": loss} if step % 10 == 0 else {}
        panel.finished(step, metrics | ({"validation/lm_loss": 3.3} if step == 1100 else {}))
    events.record("checkpoint", "step 1200 saved in 1.2 s", 1200)
    events.record("spike", "the loss rose\nto 9.1", 1200)
    clock.seconds += 5
    return told(panel, columns)


def test_in_a_narrow_window_each_line_has_its_place_and_events_follow(clock):
    lines = trained(clock, 79, on_gpu=True)
    assert lines == [
        "",
        "step 1,200/2,000 ━━━━━━━━━━━━━━━━━━━━━━━─────────────── 60%  ETA 5m 20s (13:53)",
        "loss        2.050  ██████▇▆▅▄▃▃▃▂▂▂▂▁▁▁  lr 5.9e-04  grad norm 0.83",
        "speed       400 ms/step  39.8k tokens/s",
        "compute     171 TFLOP/s/gpu  MFU 43%",
        "time        data loading 25%  step 75%",
        "memory      61.2 GB of 80.0 GB",
        "checkpoint  step 1200 saved in 1.2 s  5s ago",
        "validation  loss 3.3000  at step 1,100  45s ago",
        "events      13:48:00  spike: the loss rose to 9.1",
    ]


def test_in_a_wide_window_events_stand_beside_the_state(clock):
    lines = trained(clock, 199, peak_name="a measured matmul")
    assert len(lines[1]) == 199
    assert lines[2].endswith("  events")
    assert lines[3] == f"{'speed       400 ms/step  39.8k tokens/s':90}13:48:00  spike: the loss rose to 9.1"
    assert lines[4] == "compute     171 TFLOP/s/rank  MFU 43% of a measured matmul"
    assert len(lines) == 9


@pytest.mark.parametrize("columns", [10, 30, 79, 127, 128, 199, 500])
def test_only_the_text_of_an_event_may_be_cut(clock, columns):
    for line in trained(clock, columns):
        assert columns < 79 or len(line) <= columns or "the loss rose" in line


def test_figures_that_are_older_than_the_step_say_of_which_step_they_are(clock):
    panel = view(Liveness())
    panel.finished(1001, METRICS)
    assert "at step" not in told(panel)[2]
    panel.finished(1002, {})
    assert told(panel)[1].startswith("step 1,002/2,000")
    assert told(panel)[2].endswith("at step 1,001")


def test_a_run_that_goes_back_shows_the_step_to_which_it_went(clock):
    panel = view(Liveness())
    for step in range(1001, 1021):
        clock.seconds += 1
        panel.finished(step, METRICS if step == 1020 else {})
    assert "ETA 16m 20s" in told(panel)[1]
    panel.rewound(1010)
    assert told(panel)[1].startswith("step 1,010/2,000") and "ETA" not in told(panel)[1]


def test_the_first_step_shows_how_long_it_has_been_compiling(clock):
    liveness = Liveness()
    panel = view(liveness, compiles=True)
    liveness.begin("training step")
    clock.seconds += 31
    assert told(panel)[1].endswith("50%  compiling, first step: 31s")
    panel.finished(1001, METRICS)
    assert "compiling" not in told(panel)[1]
    liveness.begin("validation")
    clock.seconds += 3
    assert told(panel)[1].endswith("validation: 3s")


def test_measured_phases_of_a_step_take_the_place_of_the_hosts_time(clock):
    panel = view(Liveness())
    panel.finished(1001, METRICS | {"runtime/forward_seconds": 0.0601, "runtime/data_wait_seconds": 0.0})
    assert "step time   data wait 0.0 ms  forward 60.1 ms" in told(panel)


def test_a_run_with_fp16_shows_loss_scale_and_skipped_steps(clock):
    panel = view(Liveness())
    panel.finished(1001, METRICS | {"train/loss_scale": 1024.0, "train/skipped_steps": 2.0})
    assert told(panel, 120)[2].endswith("loss scale 1024  skipped 2")


def test_the_memory_of_a_process_is_that_which_it_holds():
    held = memory_of(torch.device("cpu"))()
    assert held.endswith(" GB, this rank") and " of " in held


def test_a_sparkline_spans_its_values_but_the_first_quarter():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▁▁▂▄▅▇█"
    assert sparkline([100, 8, 1, 1, 1, 8, 1, 8], 8) == "██▁▁▁█▁█"
    assert sparkline([1, math.nan, 1, 2], 8) == "▁·▁█"
    assert sparkline([5.0], 8) == "▁"
    assert sparkline(range(1000), 10) == "▁▁▁▂▃▄▅▆▇█"
    assert sparkline([], 8) == sparkline([1], 0) == sparkline([1], -3) == ""


def test_a_trend_is_of_means_over_equally_many_values():
    trend = Trend(4)
    for value in range(1, 12):
        trend.add(value)
    assert trend.means == [2.5, 6.5, 10.0], "of 1 to 4, 5 to 8, and 9 to 11"
    for value in range(100_000):
        trend.add(value)
    assert len(trend.means) <= 4
