"""The report of a run: real processes write it, at the right moments, and what they cannot do ends no run."""

import json
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.state import TrainState
from megatron.engine.training import StepOutput
from megatron.events import EventLog
from megatron.launch.report_process import ReportProcess
from megatron.report.command import run
from megatron.report.write import read_runs, write_report
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
            assert not hook.process.is_running(), step
    assert hook.process.is_running()
    hook.process.wait()
    steps = [row.split(",")[1] for row in (tmp_path / "report.csv").read_text().splitlines()[1:]]
    assert steps[:2] == ["1", "2"]
    hook.after_step(finished(4))
    assert not hook.process.is_running(), "once for each checkpoint"


def test_a_report_of_a_checkpoint_does_not_replace_one_that_was_written_meanwhile(tmp_path, monkeypatch):
    logged(tmp_path, 1)
    output = tmp_path / "report.html"

    def read_slowly(folders):
        records = read_runs(folders)
        logged(tmp_path, 2)
        write_report(read_runs(folders), output)
        return records

    monkeypatch.setattr("megatron.report.command.read_runs", read_slowly)
    monkeypatch.setattr("megatron.report.command._give_way", lambda: None)  # of this process
    run([str(tmp_path), "-o", str(output), "--background"])
    assert (tmp_path / "report.csv").read_text().splitlines()[-1].startswith(f"{tmp_path.name},2,")


def test_a_report_that_cannot_be_started_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cleaned"))
    told: list[str] = []
    process = ReportProcess(tmp_path, told.append)
    process.start()
    assert told == ["the report could not be written: No such file or directory"] and not process.is_running()


def test_at_the_end_the_report_of_a_checkpoint_gives_way_to_the_last_one(tmp_path, hook):
    EventLog(tmp_path, [hook.told]).record("checkpoint", "saved", 1)
    logged(tmp_path, 1)
    hook.after_step(finished(2))
    hook.after_step(finished(3, last=True))
    hook.close()
    assert not hook.process.is_running()
    logged(tmp_path, 3)
    hook.process.start()
    hook.process.wait()
    assert (tmp_path / "report.csv").read_text().splitlines()[-1].startswith(f"{tmp_path.name},3,")
    assert (tmp_path / "report.html").stat().st_size > 50_000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_that_is_stopped_does_not_wait(tmp_path):
    logged(tmp_path, 1)
    process = ReportProcess(tmp_path, print)
    process.start()
    process.wait(lambda: True)
    assert process.is_running()
    process.wait()
    assert (tmp_path / "report.html").exists()


def test_a_report_that_cannot_be_written_is_warned_of_with_the_reason(tmp_path):
    logged(tmp_path, 1)
    (tmp_path / "report.html").write_text("somebody's own page")
    told: list[str] = []
    process = ReportProcess(tmp_path, told.append)
    process.start()
    process.wait()
    (text,) = told
    assert text.startswith("the report could not be written: ") and "is there and is no report" in text
    assert (tmp_path / "report.html").read_text() == "somebody's own page"


def test_an_interpreter_that_cannot_be_started_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    told: list[str] = []
    ReportProcess(tmp_path, told.append).start()
    assert told == ["the report could not be written: No such file or directory"]
