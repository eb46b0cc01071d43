"""Runs that go on by themselves (max_restarts): after a death, a hang, and a node that is lost.

The run of test_torture.py that is not long is a short form of it.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.reading import read_tensors
from megatron.events import Event, read_events
from tests.end_to_end.commands import SMALL, command, run
from tests.end_to_end.hosts import Host, network, ssh_options, why_not
from tests.end_to_end.processes import deepy, end, is_running, process_of_rank, started, steps_done, wait_for
from tests.end_to_end.test_two_nodes import rank_of

REASON = why_not()
needs_hosts = pytest.mark.skipif(REASON is not None, reason=REASON or "")
# Slow enough to be disturbed at a chosen step.
SLOW = """
import os, signal, time

DEEPY_REGISTRY = {"hook": {"slow": "slow:build"}}

def build(run):
    from megatron.training.hooks.base import Hook

    class Slow(Hook):
        def after_step(self, step):
            time.sleep(0.1)
            if os.environ.get("DIES_AFTER") == str(step.state.step) and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            return {}

    return Slow()
"""
RESTARTS = "checkpoint_factor: 5\nplugins: [slow]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration, and a run of two ranks that was never disturbed."""
    folder = tmp_path_factory.mktemp("restarts")
    (folder / "small.yml").write_text(SMALL.replace("train_iters: 20", "train_iters: 50") + RESTARTS)
    (folder / "slow.py").write_text(SLOW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        run(folder, "deepy.py", "train.py", "small", "save=whole", "num_gpus=2")
        yield folder


def assert_same_end(folder: Path, save: str) -> None:
    """The run ended as the undisturbed one did, bit for bit."""
    wanted, found = (read_tensors(folder / name / "global_step50") for name in ("whole", save))
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def restarts(folder: Path, save: str) -> list[Event]:
    return [event for event in read_events(folder / save / "logs") if event.kind == "restart"]


@pytest.mark.long
def test_a_run_whose_rank_is_killed_starts_again_by_itself_and_ends_like_an_undisturbed_one(folder):
    with deepy(folder, "train.py", "small", "save=killed", "num_gpus=2", "max_restarts=1") as process:
        wait_for(lambda: steps_done(folder / "killed") >= 7, process)
        os.kill(process_of_rank(1, process), signal.SIGKILL)
        code, out, err = end(process)
    assert code == 0, err
    assert "resuming from killed/global_step" in out  # although load is not set
    assert_same_end(folder, "killed")
    [event] = restarts(folder, "killed")
    details = event.details
    assert "rank 1 was ended by SIGKILL" in details["reason"]
    assert (details["rank"], details["node"], details["wait"]) == (1, os.uname().nodename, 1.0)
    assert event.step is not None and event.step >= 7
    assert f"restarting in 1 s (1 of 1): {details['reason']} (step {event.step})\nrestart 1 of 1\n" in err
    logs = folder / "killed" / "logs"
    assert {path.name for path in logs.glob("rank_*")} == {
        *("rank_0.log", "rank_1.log", "rank_0_attempt_2.log", "rank_1_attempt_2.log")
    }
    assert "starting fresh" in (logs / "rank_0.log").read_text()
    assert "resuming from" in (logs / "rank_0_attempt_2.log").read_text()


@pytest.mark.long
def test_a_rank_that_is_stopped_is_found_by_the_watchdog_and_the_run_starts_again(folder):
    words = ("save=stopped", "num_gpus=2", "max_restarts=1", "watchdog_timeout=5")
    with deepy(folder, "train.py", "small", *words) as process:
        wait_for(lambda: steps_done(folder / "stopped") >= 7, process)
        os.kill(process_of_rank(1, process), signal.SIGSTOP)
        code, _, err = end(process)
    assert code == 0, err
    assert_same_end(folder, "stopped")
    [event] = restarts(folder, "stopped")
    assert (event.details["rank"], "the run hung" in event.details["reason"]) == (1, True)


@pytest.mark.long
def test_a_run_that_always_fails_at_one_step_stops_after_three_times_with_the_batch_of_that_step(folder, monkeypatch):
    monkeypatch.setenv("DIES_AFTER", "8")
    done = run(folder, "deepy.py", "train.py", "small", "save=same", "num_gpus=2", "max_restarts=9", expect=1)
    file = folder / "same" / "logs" / "bad_batch_step_8.jsonl"
    assert (
        f"not restarted: it has failed 3 times in a row at step 8; its batch is in same/logs/{file.name}" in done.stderr
    )
    assert [json.loads(line)["sample"] for line in file.read_text().splitlines()] == list(range(7 * 8, 8 * 8))
    assert [event.details["wait"] for event in restarts(folder, "same")] == [1.0, 2.0]


@pytest.mark.long
def test_what_would_happen_again_and_what_was_wanted_is_not_restarted(folder, tmp_path):
    wrong = run(folder, "deepy.py", "train.py", "small", "save=wrong", "load=nothing", "max_restarts=3", expect=2)
    assert "load (nothing) has no checkpoint" in wrong.stderr and "restart" not in wrong.stderr
    with deepy(folder, "train.py", "small", "save=asked", "num_gpus=2", "max_restarts=3") as process:
        wait_for(lambda: steps_done(folder / "asked") >= 3, process)
        code, out, err = end(process, signal.SIGTERM)
    assert code == 0 and "stopped by SIGTERM" in out and "restart" not in err
    assert restarts(folder, "asked") == restarts(folder, "wrong") == []


FAULTY = """
import json, os, signal, subprocess
from pathlib import Path
from megatron.errors import UserError

DEEPY_REGISTRY = {"hook": {"faulty": "faulty:build"}}
TEMPORARY, MARK = Path(os.environ["TMPDIR"]), Path("refused")

def build(run):
    from megatron.training.hooks.base import Hook

    number = json.loads(os.environ["DEEPY_ATTEMPT"])["number"]
    if number > 1 and os.environ["RANK"] == "1" and not MARK.exists():
        MARK.touch()
        raise UserError("a disk is away")

    class Faulty(Hook):
        def after_step(self, step):
            if step.state.step == 8 and number == 1 and os.environ["RANK"] == "1":
                away = TEMPORARY.with_name("away")
                TEMPORARY.rename(away)
                # In another session, and no child of a rank, with which it would end.
                later = f"(sleep 10; mv {away} {TEMPORARY}) >/dev/null 2>&1 &"
                subprocess.run(["sh", "-c", later], start_new_session=True, check=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return {}

    return Faulty()
"""


@pytest.mark.long
def test_disks_that_are_away_for_a_while_after_the_first_start_are_waited_for(folder, tmp_path, monkeypatch):
    (folder / "faulty.py").write_text(FAULTY)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    words = ("save=faulty", "plugins=[slow, faulty]", "num_gpus=2", "max_restarts=9")
    done = run(folder, "deepy.py", "train.py", "small", *words)
    assert "the folder of the run's status files cannot be made in TMPDIR or /tmp: No such file" in done.stderr
    assert "a disk is away" in restarts(folder, "faulty")[-1].text
    assert_same_end(folder, "faulty")


@pytest.fixture
def three(folder, tmp_path, monkeypatch):
    """Three hosts, of which the third is a spare, and the keys to them."""
    keys = tmp_path / "ssh"
    keys.mkdir()
    with network(keys, "abc") as hosts:
        (folder / "hosts").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", ssh_options(keys))
        monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin")
        yield hosts


def disturbed(folder: Path, hosts: tuple[Host, ...], save: str, disturb, *words: str) -> tuple[str, str]:
    """A run on the first two hosts that `disturb` meets after some steps; its output once it has ended well."""
    words = ("-H", "hosts", "num_nodes=2", f"save={save}", "max_restarts=2", *words)
    with started(folder, hosts[0].command(*command("deepy.py", "train.py", "small", *words))) as process:
        wait_for(lambda: steps_done(folder / save) >= 7, process)
        ranks = [number for host in hosts for number in host.processes() if rank_of(number)]
        disturb()
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(ranks) == 2
    return out, err


@pytest.mark.long
@needs_hosts
def test_a_node_whose_processes_are_killed_is_used_again(folder, three):
    def kill() -> None:
        for number in three[1].processes():
            if number not in servers:
                os.kill(number, signal.SIGKILL)

    servers = three[1].processes()  # sshd, which outlives it
    _, err = disturbed(folder, three, "nine", kill)
    assert_same_end(folder, "nine")
    [event] = restarts(folder, "nine")
    assert f"lost the node {three[1].address}" in event.details["reason"]
    assert event.details["nodes"] == [three[0].address, three[1].address]
    assert f"restart 1 of 2 on {three[0].address}, {three[1].address}\n" in err


@pytest.mark.long
@needs_hosts
def test_a_node_that_is_dead_is_replaced_by_the_spare(folder, three):
    disturbed(folder, three, "dead", three[1].kill_everything)
    assert_same_end(folder, "dead")
    [event] = restarts(folder, "dead")
    assert event.details["node"] == three[1].address
    assert event.details["nodes"] == [three[0].address, three[2].address]
    assert "does not answer" in event.details["left_out"][three[1].address]


@pytest.mark.long
@needs_hosts
def test_a_node_that_is_stopped_with_everything_on_it_is_replaced_and_stays_out_when_it_wakes(folder, three):
    """It is the node of rank 0, which holds the lock of the checkpoints while it is stopped."""
    first, second, spare = three[1], three[0], three[2]
    (folder / "hosts").write_text("".join(f"{host.address} slots=1\n" for host in (first, second, spare)))
    out, _ = disturbed(folder, three, "frozen", lambda: first.kill_everything(signal.SIGSTOP))
    assert_same_end(folder, "frozen")
    [event] = restarts(folder, "frozen")
    assert event.details["nodes"] == [second.address, spare.address]
    assert "does not answer" in event.details["left_out"][first.address]
    asleep = [number for number in first.processes() if rank_of(number)]
    assert asleep and f"the lock is taken from process {asleep[0]} on" in out
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "frozen").iterdir()}
    first.kill_everything(signal.SIGCONT)
    deadline = time.monotonic() + 20
    while any(map(is_running, asleep)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [number for number in asleep if is_running(number)]
    assert before == {path.name: path.stat().st_mtime_ns for path in (folder / "frozen").iterdir()}
    assert_same_end(folder, "frozen")


@pytest.mark.long
@needs_hosts
def test_a_node_whose_cable_is_cut_is_replaced_by_the_spare(folder, three):
    disturbed(folder, three, "cut", three[1].cut_cable, "watchdog_timeout=5")
    assert_same_end(folder, "cut")
    [event] = restarts(folder, "cut")
    assert "the run hung" in event.details["reason"]
    assert event.details["nodes"] == [three[0].address, three[2].address]
    assert not [number for number in three[1].processes() if rank_of(number) and is_running(number)]


@pytest.mark.long
@needs_hosts
def test_without_a_spare_the_run_goes_on_with_fewer_nodes_and_the_same_batch(folder, three):
    (folder / "hosts").write_text("".join(f"{host.address} slots=1\n" for host in three[:2]))
    out, err = disturbed(folder, three, "fewer", three[1].kill_everything)
    assert "batch: 8 samples = micro-batch 4 x accumulation 1 x 2 data-parallel" in out
    assert "batch: 8 samples = micro-batch 4 x accumulation 2 x 1 data-parallel" in out
    assert f"restart 1 of 2 on {three[0].address}; {three[1].address} is left out: does not answer" in err
    wanted, found = (read_tensors(folder / name / "global_step50") for name in ("whole", "fewer"))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
