"""The hook of the report: real processes write it, at the right moments, and what they cannot do ends no run."""

import json
import logging
import time
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.state import TrainState
from megatron.engine.training import StepOutput
from megatron.events import EventLog
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.report import ReportWriter


def finished(step: int, last: bool = False, stop: bool = False) -> FinishedStep:
    return FinishedStep(TrainState(step), StepOutput(torch.tensor(1.0), torch.tensor(1.0)), 1e-3, last, is_stop=stop)


def logged(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "train/lm_loss": 3.0}) + "\n")


@pytest.fixture
def hook(tmp_path):
    return ReportWriter(tmp_path)


def test_the_report_is_begun_a_step_after_a_checkpoint_and_holds_the_metrics_of_its_step(tmp_path, hook):
    events = EventLog(tmp_path, [hook.told])
    for step in (1, 2, 3):
        if step == 2:
            events.record("checkpoint", "saved", 2)
        hook.after_step(finished(step))
        logged(tmp_path, step)
        if step < 3:
            assert hook._process is None, step
    process = hook._process
    assert process is not None and process.wait(60) == 0
    steps = [row.split(",")[1] for row in (tmp_path / "report.csv").read_text().splitlines()[1:]]
    assert steps[:2] == ["1", "2"]
    hook.after_step(finished(4))
    assert hook._process is None, "once for each checkpoint"


def test_the_end_of_a_run_waits_for_the_report_with_its_last_step(tmp_path, hook):
    EventLog(tmp_path, [hook.told]).record("checkpoint", "saved", 1)
    logged(tmp_path, 1)
    hook.after_step(finished(2))  # begins a report, which is overtaken
    hook.after_step(finished(3, last=True))
    logged(tmp_path, 3)
    hook.close()
    assert (tmp_path / "report.csv").read_text().splitlines()[-1].startswith(f"{tmp_path.name},3,")
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_that_is_stopped_or_has_failed_does_not_wait(tmp_path, hook):
    logged(tmp_path, 1)
    hook.after_step(finished(1, last=True, stop=True))
    started = time.monotonic()
    hook.close()
    assert time.monotonic() - started < 0.3 or not (tmp_path / "report.html").exists()
    assert hook._process is not None and hook._process.wait(60) == 0
    assert (tmp_path / "report.html").exists()


def test_a_report_that_cannot_be_written_is_warned_of_with_the_reason(tmp_path, hook, caplog):
    logged(tmp_path, 1)
    (tmp_path / "report.html").write_text("somebody's own page")
    hook.after_step(finished(1, last=True))
    with caplog.at_level(logging.WARNING):
        hook.close()
    assert "the report could not be written: " in caplog.text and "is there and is no report" in caplog.text
    assert (tmp_path / "report.html").read_text() == "somebody's own page"


def test_an_interpreter_that_cannot_be_started_is_warned_of(tmp_path, hook, caplog, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    hook.after_step(finished(1, last=True))
    with caplog.at_level(logging.WARNING):
        hook.close()
    assert "the report could not be written: No such file or directory" in caplog.text
