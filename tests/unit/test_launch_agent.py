"""What the agent of a node says when it cannot start: real processes, no ranks."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron.launch.launchers.launcher import AGENT
from megatron.launch.protocol.job import JobSpec, write_job


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
