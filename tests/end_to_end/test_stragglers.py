"""A rank that is slower than the other is named, with the phase in which it is slow."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.events import Event, read_events
from tests.end_to_end.commands import SMALL, json_lines
from tests.end_to_end.processes import deepy, end, process_of_rank, steps_done, wait_for

LARGER = ("hidden_size=128", "seq_length=128", "num_layers=4", "train_iters=100000", "eval_iters=0", "log_interval=10")
SLOW_READER = """
import os, time

DEEPY_REGISTRY = {}

if os.environ.get("RANK") == "1":
    from megatron.data.mock import MockStream
    read = MockStream.tokens

    def slow(self, start, length):
        time.sleep(0.03)
        return read(self, start, length)

    MockStream.tokens = slow
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL + "save: run\n")
    return tmp_path


def told_of(folder, phase: str) -> list[Event]:
    """The events of stragglers in a phase."""
    events = read_events(folder / "run" / "logs")
    return [event for event in events if event.kind == "straggler" and event.details["phase"] == phase]


@contextmanager
def busy(core: int) -> Iterator[None]:
    """Eight processes compute on a core all the time.

    Each has a session of its own: where Linux groups tasks by session (sched_autogroup), those of one session would
    share what one gets.
    """
    words = [sys.executable, "-c", f"import os\nos.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    processes = [subprocess.Popen(words, start_new_session=True) for _ in range(8)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bind(process: int, core: int) -> None:
    """Bind all threads of a process to a core."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


@pytest.mark.long
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each of two ranks")
def test_a_rank_that_shares_its_core_with_busy_processes_is_named(folder):
    core = max(os.sched_getaffinity(0))
    with deepy(folder, "train.py", "small", *LARGER, "num_gpus=2") as process:
        wait_for(lambda: steps_done(folder / "run") >= 1, process)
        bind(process_of_rank(1, process), core)
        with busy(core):
            wait_for(lambda: any(event.details["ranks"] == [1] for event in told_of(folder, "forward")), process)
            code, out, err = end(process, signal.SIGTERM)
    assert code == 0, err
    event = next(event for event in told_of(folder, "forward") if event.details["ranks"] == [1])
    assert event.text in out
    assert f"rank 1 on {os.uname().nodename} is slow in the forward pass: " in event.text
    assert event.details["seconds"] > 1.3 * event.details["others"]
    rows = [row for row in json_lines(folder / "run" / "logs" / "metrics.jsonl") if "runtime/slowest_rank" in row]
    (row, *_) = [row for row in rows[-3:] if row["runtime/slowest_rank"] == 1]
    assert row["runtime/slowest_rank_seconds"] > row["runtime/fastest_rank_seconds"]


@pytest.mark.long
def test_a_rank_that_reads_slowly_is_named(folder, monkeypatch):
    (folder / "slow_reader.py").write_text(SLOW_READER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    # masked labels are counted over all ranks before a step, where the other waits for the slow one
    words = ("num_gpus=2", "plugins=[slow_reader]", "log_interval=10", "eval_iters=0", "eod_mask_loss=true")
    with deepy(folder, "train.py", "small", *words, "train_iters=60") as process:
        code, out, err = end(process)
    assert code == 0, err
    (event,) = told_of(folder, "data")
    assert event.details["ranks"] == [1] and event.step == 31, "known after three intervals, a step later"
    assert "rank 1 on " in event.text and "is slow in reading data" in event.text
    assert event.text in out
