"""A run that hangs is ended, and the rank that causes the hang is named."""

import os
import re
import signal

import pytest

from megatron.events import read_events
from tests.end_to_end.commands import SMALL
from tests.end_to_end.processes import (
    deepy,
    descendants,
    end,
    is_running,
    process_of_rank,
    steps_done,
    wait_for,
)

MANY = "train_iters=100000"
# Two ranks read four samples a step, so the eleventh step sleeps.
SLEEPER = """
import os, time

DEEPY_REGISTRY = {}

if os.environ.get("RANK") == "1":
    from megatron.data.mock import MockStream
    read, reads = MockStream.tokens, []

    def sleepy(self, start, length):
        reads.extend([start] if self.name == "train" else [])
        if len(reads) > 40:
            time.sleep(1000)
        return read(self, start, length)

    MockStream.tokens = sleepy
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL + "save: run\n")
    return tmp_path


@pytest.mark.long  # as one that sleeps, but that its stacks are waited for in vain
def test_a_rank_that_is_stopped_is_named_and_the_run_ended(folder):
    with deepy(folder, "train.py", "small", MANY, "num_gpus=2", "watchdog_timeout=3") as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        ranks = descendants(process.pid)
        os.kill(process_of_rank(1, process), signal.SIGSTOP)
        code, _, err = end(process)
    assert code == 1
    assert re.search(r"more than 3 s \(watchdog_timeout\)", err), err
    assert re.search(r"rank 1 is stopped by a signal or a debugger", err), err
    # The other stands where the stopped rank left it: in the gradients of its step, or in the next one.
    waiting = re.findall(r"ranks? ([\d, ]+) waits? in all_reduce \([^)]*, step \d+\)", err)
    assert sorted(", ".join(waiting).split(", ")) == ["0"], err
    logs = folder / "run" / "logs"
    assert "in train_steps" in (logs / "stacks_rank_0.txt").read_text()
    hang, failure = read_events(logs)[-2:]
    assert (hang.kind, hang.details["rank"] in range(2), hang.details["seconds"] >= 3) == ("hang", True, True)
    # The rank that waited for longest is in the step that rank 0 has counted, or in the next one.
    assert hang.step - steps_done(folder / "run") in (0, 1) and "rank 1 is stopped by a signal" in hang.text
    assert (failure.kind, failure.details) == ("failure", {"code": 1}) and "the run hung" in failure.text
    assert not [process for process in ranks if is_running(process)]


def test_a_rank_asleep_in_its_data_is_named_with_the_line(folder, monkeypatch):
    (folder / "sleeper.py").write_text(SLEEPER)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    with deepy(folder, "train.py", "small", MANY, "num_gpus=2", "watchdog_timeout=3", "plugins=[sleeper]") as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        ranks = descendants(process.pid)
        code, _, err = end(process)
    assert code == 1
    assert re.search(r"more than 3 s \(watchdog_timeout\)", err), err
    assert re.search(r"rank 1 is in data loading \(sleeper\.py:13, step 11\)", err), err
    assert re.search(r"rank 0 waits in all_reduce \(.*, step 11\)", err), err
    logs = folder / "run" / "logs"
    assert "in train_steps" in (logs / "stacks_rank_0.txt").read_text()
    assert "in sleepy" in (logs / "stacks_rank_1.txt").read_text()
    assert [event.kind for event in read_events(logs)[-2:]] == ["hang", "failure"]
    assert not [process for process in ranks if is_running(process)]


@pytest.mark.long
def test_with_watchdog_action_wait_the_run_goes_on_when_the_rank_does(folder):
    with deepy(
        folder, "train.py", "small", MANY, "num_gpus=2", "watchdog_timeout=2", "watchdog_action=wait"
    ) as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        stopped = process_of_rank(1, process)
        os.kill(stopped, signal.SIGSTOP)
        wait_for((folder / "run" / "logs" / "stacks_rank_0.txt").is_file, process)
        before = steps_done(folder / "run")
        os.kill(stopped, signal.SIGCONT)
        wait_for(lambda: steps_done(folder / "run") > before + 2, process)
        code, _, err = end(process, signal.SIGTERM)
    assert code == 0
    assert "rank 1 is stopped" in err
