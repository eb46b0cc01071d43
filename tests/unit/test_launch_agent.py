"""What the agent of a node says when it cannot start: real processes, no ranks."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megatron.launch.launchers.launcher import AGENT
from megatron.launch.protocol.heartbeat import NOT_BEGUN
from megatron.launch.protocol.job import JobSpec, OrderBook, write_job
from megatron.launch.protocol.records import process_state, read_node


@pytest.fixture
def job(tmp_path):
    return JobSpec(
        hosts=("node1", "node2"),
        slots=((0,), (0,)),
        script="train.py",
        arguments=(),
        working_folder=str(tmp_path),
        log_folder=None,
        environment={},
        backend=None,
        master_address=None,
        master_port=None,
        max_gpu_memory_in_use=0.1,
        remote=True,
    )


def agent(*words, **environment):
    """Exit code and stderr of the agent."""
    command = [sys.executable, "-P", AGENT, *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=60, check=False
    )
    return done.returncode, done.stderr


def test_a_folder_that_is_not_shared_is_named_with_the_host(tmp_path):
    assert agent(tmp_path, "--node", "0") == (
        1,
        f"error: {os.uname().nodename}: {tmp_path}/job.json cannot be read (No such file or directory); all nodes must "
        "share this folder (log_dir says where it is)\n",
    )


@pytest.mark.parametrize(("number", "shown"), [(None, "not set"), ("one", "one"), ("2", "2")])
def test_a_number_that_is_not_a_node_of_the_run_is_named(tmp_path, job, number, shown):
    """The mpirun of another MPI sets no OMPI_COMM_WORLD_RANK."""
    write_job(tmp_path, job)
    code, said = agent(tmp_path, "--variable", "SOME_RANK", **({} if number is None else {"SOME_RANK": number}))
    assert code == 1
    assert f"SOME_RANK is {shown}, but must be the number of this node, below 2" in said
    assert "Traceback" not in said


def test_a_host_that_is_not_in_the_run_is_named(tmp_path, job):
    write_job(tmp_path, job)
    code, said = agent(tmp_path, "--host", "node3")
    assert (code, said) == (1, "error: the launcher started an agent on node3, which is not a host of this run\n")


def test_a_working_folder_that_is_missing_on_a_node_is_named(tmp_path, job):
    write_job(tmp_path, replace(job, working_folder="/no/such/folder"))
    code, said = agent(tmp_path, "--node", "1")
    assert code == 1
    assert "the working folder /no/such/folder cannot be entered (No such file or directory)" in said
    assert "Traceback" not in said


STUBBORN = """
import os, signal, time
from pathlib import Path
from megatron.launch.protocol.heartbeat import RUN_FOLDER, Heartbeat

signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.environ["RANK"] == "1":
    while not Path("begin").exists():
        time.sleep(0.02)
    heart = Heartbeat.of_this_process()
    while not Path("vanish").exists():
        time.sleep(0.02)
    Path(os.environ[RUN_FOLDER], "heartbeat_1").unlink()
    Path("vanish").unlink()
time.sleep(600)
"""


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_agent_reports_ranks_before_their_first_beat_and_while_it_ends_them(tmp_path, job):
    """A rank that hangs while it imports is seen; one that was ended did not vanish; ending ranks is no silence."""
    script = tmp_path / "train.py"
    script.write_text(STUBBORN)
    write_job(tmp_path, replace(job, hosts=("here",), slots=((0, 1),), script=str(script), remote=False))
    orders = OrderBook(tmp_path)
    with subprocess.Popen([sys.executable, "-P", AGENT, tmp_path, "--node", "0"]) as process:
        try:
            wait_for(lambda: read_node(tmp_path, 0) is not None)
            (tmp_path / "job.json").unlink()  # as a cleaner of /tmp does after days
            orders.give(start=True)
            wait_for(lambda: len(read_node(tmp_path, 0).ranks) == 2)
            seen = read_node(tmp_path, 0).statuses
            assert [(one.rank, one.step, one.phase) for one in seen] == [(0, 0, NOT_BEGUN), (1, 0, NOT_BEGUN)]
            assert 0 < seen[0].age < 60
            (tmp_path / "begin").touch()
            wait_for(lambda: read_node(tmp_path, 0).statuses[1].phase == "starting")
            (tmp_path / "vanish").touch()
            wait_for(lambda: not (tmp_path / "vanish").exists())
            beats = read_node(tmp_path, 0).beat
            wait_for(lambda: read_node(tmp_path, 0).beat > beats + 1)
            seen = read_node(tmp_path, 0).statuses[1]
            assert (seen.phase, seen.age > 0.9) == ("starting", True), "what was seen last, which ages"
            beats = read_node(tmp_path, 0).beat
            orders.give(end=1.5)
            wait_for(lambda: read_node(tmp_path, 0).code is not None)
            last = read_node(tmp_path, 0)
            assert (last.beat >= beats + 1, last.gone) == (True, ())
            wait_for(lambda: all(process_state(one.process) in "ZX?" for one in last.ranks))
        finally:
            process.kill()
