"""What alerts say of real runs."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.events import read_events
from tests.end_to_end.commands import SMALL, run
from tests.end_to_end.processes import deepy, end, process_of_rank, steps_done, wait_for
from tests.webhook import Server

TELL = 'alert_command: "cat >> told.jsonl; echo >> told.jsonl"\n'
# A step reads eight samples. From the 31st step on they hold tokens that occur nowhere before.
POISON = """
DEEPY_REGISTRY = {}

from megatron.data.mock import MockStream

read, reads = MockStream.tokens, []

def poisoned(self, start, length):
    reads.extend([start] if self.name == "train" else [])
    return read(self, start, length) + (128 if len(reads) > 240 else 0)

MockStream.tokens = poisoned
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "small.yml").write_text(SMALL + "save: run\nload: run\n" + TELL)
    return tmp_path


def told(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


@pytest.mark.long
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


@pytest.fixture
def webhook(monkeypatch) -> Iterator[Server]:
    """The server that runs find in the variable WEBHOOK."""
    with Server() as server:
        monkeypatch.setenv("WEBHOOK", server.address)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.long
def test_a_loss_spike_of_a_real_run_reaches_the_webhook(folder, webhook, monkeypatch):
    (folder / "poison.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    words = ("small", "num_gpus=1", "train_iters=34", "eval_iters=0", "loss_spike_window=16", "plugins=[poison]")
    with deepy(folder, "train.py", *words, "alert_webhook=WEBHOOK", "alert_kinds=[spike]") as process:
        code, _, err = end(process)
    assert code == 0, err
    assert [(alert["kind"], alert["step"]) for alert in webhook.bodies] == [("spike", 31)]
    assert "samples 240 to 247" in webhook.bodies[0]["text"]


@pytest.mark.long
def test_a_hang_of_a_real_run_reaches_the_webhook_while_the_run_hangs(folder, webhook):
    words = ("small", "train_iters=100000", "num_gpus=2", "watchdog_timeout=5", "watchdog_action=wait")
    with deepy(folder, "train.py", *words, "alert_webhook=WEBHOOK", "alert_kinds=[hang]") as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        stopped = process_of_rank(1, process)
        os.kill(stopped, signal.SIGSTOP)
        wait_for(lambda: webhook.bodies, process)
        os.kill(stopped, signal.SIGCONT)
        code, _, err = end(process, signal.SIGTERM)
    assert code == 0, err
    (alert,) = webhook.bodies
    assert alert["kind"] == "hang" and "rank 1 is stopped by a signal" in alert["text"]
