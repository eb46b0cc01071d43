"""What alerts say of real runs."""

import json
import os
import signal
from pathlib import Path

import pytest

from megatron.events import read_events
from tests.end_to_end.commands import SMALL, run
from tests.end_to_end.processes import deepy, end, process_of_rank, steps_done, wait_for

TELL = 'alert_command: "cat >> told.jsonl; echo >> told.jsonl"\n'


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "small.yml").write_text(SMALL + "save: run\nload: run\n" + TELL)
    return tmp_path


def told(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


def test_a_run_whose_rank_0_is_killed_is_told_of_and_so_is_what_rank_0_had_recorded(folder):
    words = ("small", "train_iters=100000", "num_gpus=2", "alert_kinds=[start, failure]")
    with deepy(folder, "train.py", *words) as process:
        wait_for(lambda: steps_done(folder / "run") >= 2, process)
        os.kill(process_of_rank(0, process), signal.SIGKILL)
        code, _, _ = end(process)
    assert code == 1
    start, failure = told(folder)
    assert (start["kind"], start["step"], start["run"]) == ("start", 0, str(folder / "run" / "logs"))
    assert failure["kind"] == "failure" and failure["text"].startswith("rank 0 was ended by SIGKILL")


@pytest.mark.long
def test_without_deepy_rank_0_tells_how_it_ended(folder):
    run(folder, "train.py", "small", "train_iters=2")
    run(folder, "train.py", "small", "train_iters=3", "lr_decay_style=constant")
    assert [(alert["kind"], alert["text"]) for alert in told(folder)] == [("finish", "done")] * 2
    kinds = [event.kind for event in read_events(folder / "run" / "logs") if event.kind != "checkpoint"]
    assert kinds == ["start", "finish", "resume", "finish"]
