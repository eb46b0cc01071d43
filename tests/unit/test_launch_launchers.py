"""Which agents each launcher starts, where, and with what; real mpirun, recorded srun."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron import registry
from megatron.config.load import config_from_flat
from megatron.errors import UserError
from megatron.launch import hosts as hosts_module
from megatron.launch.launchers.launcher import AGENT, usual_launcher

ROOT = Path(__file__).parents[2]
SHAPE = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8}
CPU = {"DS_ACCELERATOR": "cpu"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "64"}
TRAINING = {"train_iters": 1, "train_batch_size": 4, "data_impl": "mock", "tokenizer_type": "CharLevelTokenizer"}
# Tells what reached a rank.
PROGRAM = """
import json, os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NCCL_TEST", "MY_OWN", "UNRELATED", "WANDB_API_KEY")
with open(f"rank_{os.environ['RANK']}.seen", "w") as file:
    json.dump({name: os.environ.get(name) for name in names}, file)
if len(os.sched_getaffinity(0)) < len(os.sched_getaffinity(1)):
    raise RuntimeError("bound to a few cores")
"""
# Notes how it is called, and runs the tasks on this machine.
SRUN = f"""#!{sys.executable}
import json, os, subprocess, sys
words = sys.argv[1:]
with open("srun.json", "w") as file:
    json.dump({{"words": words, "environment": dict(os.environ)}}, file)
tasks = next(int(word.partition("=")[2]) for word in words if word.startswith("--ntasks="))
command = words[next(number for number, word in enumerate(words) if not word.startswith("-")):]
variables = [{{"SLURM_PROCID": str(task), "SLURM_STEP_ID": "0"}} for task in range(tasks)]
started = [subprocess.Popen(command, env={{"HOME": os.environ["HOME"], **own}}) for own in variables]
sys.exit(max(task.wait() for task in started))
"""


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts_module, "USUAL_HOSTFILE", tmp_path / "no_hostfile")


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """A folder on PATH whose programs exist but do nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("pdsh", "mpirun", "srun"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def launch(name, environment=CPU, **keys):
    config = config_from_flat(SHAPE | {"launcher": name} | keys)
    return registry.resolve("launcher", name)(config, "train.py", environment)


def hostfile(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


@pytest.mark.parametrize("name", registry.names("launcher"))
def test_every_launcher_gives_each_node_an_agent_and_each_rank_a_slot(name, programs):
    started = launch(name, CPU | {"SLURM_JOB_ID": "7"}, num_gpus=3)
    assert started.slots == ((0, 1, 2),)
    assert started.ranks == 3
    command = started.command(Path("/shared/run"))
    assert AGENT in " ".join(command)
    assert "/shared/run" in " ".join(command)


def test_pdsh_runs_one_command_on_all_hosts(programs, tmp_path):
    file = hostfile(tmp_path, "node1 slots=8\nnode2 slots=4\n")
    started = launch("pdsh", hostfile=file, launcher_args="-t 30")
    assert started.command(Path("/shared/run 1")) == [
        *("pdsh", "-N", "-S", "-f", "1024", "-t", "30", "-w", "node1,node2"),
        f"exec {sys.executable} -P {AGENT} '/shared/run 1' --host %h",
    ]
    assert (started.hosts, started.master) == (("node1", "node2"), "node1")
    assert started.slots == (tuple(range(8)), tuple(range(4)))
    assert started.settings == {"PDSH_RCMD_TYPE": "ssh"}


def test_mpirun_gets_one_unbound_process_per_host(programs, tmp_path):
    file = hostfile(tmp_path, "node1 slots=8\nnode2 slots=8\n")
    words = launch("openmpi", hostfile=file, launcher_args="--mca btl_tcp_if_include eth0").command(Path("/run"))
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    assert words == [
        *("mpirun", "-n", "2", "--host", "node1,node2", "--map-by", "ppr:1:node", "--bind-to", "none", *root),
        *("--mca", "btl_tcp_if_include", "eth0"),
        *(sys.executable, "-P", AGENT, "/run", "--variable", "OMPI_COMM_WORLD_RANK"),
    ]


def test_srun_gets_one_task_per_node_of_the_allocation_with_all_of_its_cores(programs):
    started = launch("slurm", CPU | ALLOCATION | {"SLURM_GPUS_ON_NODE": "8"}, launcher_args="--account=abc")
    assert started.command(Path("/run")) == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0"),
        *("--cpus-per-task=64", "--account=abc"),
        *(sys.executable, "-P", AGENT, "/run", "--variable", "SLURM_PROCID"),
    ]
    assert started.slots == (tuple(range(8)),) * 2
    assert (started.hosts, started.master) == (("", ""), None)


SCONTROL = f"""#!{sys.executable}
import sys
assert sys.argv[1:3] == ["show", "hostnames"], sys.argv
names = {{"gpu[1-3]": "gpu1 gpu2 gpu3"}}
print(*names.get(sys.argv[3], "").split(), sep="\\n")
"""


def test_restarts_under_slurm_choose_nodes_of_the_allocation_by_name(programs):
    (programs / "scontrol").write_text(SCONTROL)
    (programs / "scontrol").chmod(0o755)
    allocation = CPU | ALLOCATION | {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "gpu[1-3]"}
    started = launch("slurm", allocation, max_restarts=2, num_gpus=8, num_nodes=2)
    assert (started.hosts, started.spares) == (("gpu1", "gpu2"), {"gpu3": tuple(range(8))})
    assert started.on(["gpu1", "gpu3"]).command(Path("/run")) == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0"),
        *("--nodelist=gpu1,gpu3", "--no-kill", "--cpus-per-task=64"),
        *(sys.executable, "-P", AGENT, "/run", "--host-variable", "SLURMD_NODENAME"),
    ]
    with pytest.raises(
        UserError, match=r"max_restarts needs the names of the nodes, but `scontrol show .*` says: noth"
    ):
        launch("slurm", allocation | {"SLURM_JOB_NODELIST": "other"}, max_restarts=2, num_gpus=8)


def test_hosts_beyond_num_nodes_are_spares_of_a_run_that_may_restart(programs, tmp_path):
    file = hostfile(tmp_path, "node1 slots=8\nnode2 slots=8\nnode3 slots=8\nnode4 slots=8\n")
    for name in ("pdsh", "openmpi"):
        started = launch(name, hostfile=file, num_nodes=2, exclude="node3", max_restarts=1)
        assert (started.hosts, started.spares) == (("node1", "node2"), {"node4": tuple(range(8))})
        assert launch(name, hostfile=file, num_nodes=2).spares == {}
    again = launch("pdsh", hostfile=file, num_nodes=2, max_restarts=1).on(["node2", "node4"])
    assert again.command(Path("/run"))[-3:-1] == ["-w", "node2,node4"]


@pytest.mark.parametrize("comment", ["two words", "-x --bad", "it's $HOME; `id`"])
def test_the_comment_of_a_job_is_one_argument_of_srun(programs, comment):
    words = launch("slurm", CPU | ALLOCATION, comment=comment, num_gpus=1).command(Path("/run"))
    assert f"--comment={comment}" in words
    assert words.index(f"--comment={comment}") < words.index(sys.executable)


@pytest.mark.parametrize("name", ["pdsh", "openmpi", "slurm"])
def test_a_quote_that_is_not_closed_in_launcher_args_is_named(programs, name):
    with pytest.raises(UserError, match=r"launcher_args \(--x 'y\) cannot be split into words: No closing quotation"):
        launch(name, CPU | ALLOCATION, num_gpus=1, launcher_args="--x 'y").command(Path("/run"))


def test_a_number_of_nodes_that_slurm_did_not_write_counts_as_one_node(programs):
    assert len(launch("slurm", CPU | ALLOCATION | {"SLURM_JOB_NUM_NODES": "two"}, num_gpus=1).slots) == 1


@pytest.mark.parametrize(
    ("variables", "keys", "slots"),
    [
        ({"SLURM_GPUS_PER_NODE": "h200:4"}, {}, 4),
        ({"SLURM_NTASKS_PER_NODE": "6"}, {}, 6),
        ({"SLURM_GPUS_ON_NODE": "8"}, {"num_gpus": 2}, 2),
        ({}, {"pipe_parallel_size": 2}, 2),
    ],
)
def test_slurm_says_how_many_ranks_a_node_gets_unless_num_gpus_does(programs, variables, keys, slots):
    assert launch("slurm", CPU | ALLOCATION | variables, **keys).slots == (tuple(range(slots)),) * 2


@pytest.mark.parametrize(
    ("name", "environment", "keys", "message"),
    [
        ("slurm", CPU, {}, "works inside an allocation"),
        ("slurm", CPU | ALLOCATION, {"num_nodes": 3}, r"num_nodes \(3\) is more than the 2 of this allocation"),
        ("slurm", CPU | ALLOCATION, {"include": "node1"}, "sbatch --nodelist"),
        ("pdsh", CPU, {"num_nodes": 2}, "launcher pdsh needs the names of the nodes"),
        ("pdsh", CPU, {"hostfile": "node1 slots=1\nlocalhost slots=1"}, 'names "localhost" alongside other hosts'),
        ("openmpi", CPU, {"hostfile": "fe80::1 slots=1\nnode2 slots=1"}, "reads .fe80::1. as a host with slots"),
        ("local", CPU, {"hostfile": "node1 slots=1\nnode2 slots=1"}, "launcher pdsh starts them on all"),
    ],
)
def test_a_launcher_that_cannot_work_here_says_what_would(programs, tmp_path, name, environment, keys, message):
    if "hostfile" in keys:
        keys = keys | {"hostfile": hostfile(tmp_path, keys["hostfile"])}
    with pytest.raises(UserError, match=message):
        launch(name, environment, **keys)


def test_a_program_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, package in (("pdsh", "apt install pdsh"), ("openmpi", "apt install openmpi-bin"), ("slurm", "srun")):
        with pytest.raises(UserError, match=package):
            launch(name, CPU | ALLOCATION)


@pytest.mark.parametrize(
    ("environment", "keys", "name"),
    [
        ({}, {}, "local"),
        ({}, {"hostfile": "node1 slots=8"}, "local"),
        ({}, {"hostfile": "node1 slots=8\nnode2 slots=8"}, "pdsh"),
        ({}, {"hostfile": "node1 slots=8\nnode2 slots=8", "include": "node2"}, "local"),
        ({}, {"hostfile": "node1 slots=8\nnode2 slots=8", "num_nodes": 1}, "local"),
        (ALLOCATION, {}, "slurm"),
        (ALLOCATION, {"hostfile": "node1 slots=8\nnode2 slots=8"}, "pdsh"),
        (ALLOCATION, {"num_nodes": 1}, "local"),
        (ALLOCATION | {"SLURM_STEP_ID": "0"}, {}, "local"),
        (ALLOCATION | {"SLURM_STEP_ID": "4294967290"}, {}, "slurm"),
        (ALLOCATION | {"SLURM_JOB_NUM_NODES": "1"}, {}, "local"),
    ],
)
def test_where_no_launcher_is_named_the_hosts_decide(tmp_path, environment, keys, name):
    if "hostfile" in keys:
        keys = keys | {"hostfile": hostfile(tmp_path, keys["hostfile"])}
    assert usual_launcher(config_from_flat(SHAPE | keys), environment) == name


def run(folder: Path, environment: dict[str, str], **keys: object) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    (folder / "shape.yml").write_text(json.dumps(SHAPE | TRAINING | keys))
    return subprocess.run(
        [sys.executable, str(ROOT / "deepy.py"), "program.py", "shape"],
        cwd=folder,
        env=os.environ
        | CPU
        | {"NCCL_TEST": "a b", "MY_OWN": "$x", "UNRELATED": "1", "WANDB_API_KEY": "k"}
        | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def seen(folder: Path, rank: int) -> dict[str, str | None]:
    return json.loads((folder / f"rank_{rank}.seen").read_text())


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun here (apt install openmpi-bin)")
def test_mpirun_starts_the_ranks_of_this_machine(tmp_path):
    done = run(tmp_path, {}, launcher="openmpi", num_gpus=2)
    assert (done.returncode, done.stderr) == (0, "")
    assert [seen(tmp_path, rank)["LOCAL_RANK"] for rank in (0, 1)] == ["0", "1"]
    assert seen(tmp_path, 1)["WORLD_SIZE"] == "2"


def test_srun_starts_agents_that_get_what_matters_without_a_hostfile_or_ssh(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = run(tmp_path, ALLOCATION | {"PATH": path}, num_gpus=1, forward_environment=["MY_OWN"])
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "srun.json").read_text())
    assert record["words"][:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert record["environment"]["SLURM_JOB_ID"] == "7"
    matters = {"NCCL_TEST": "a b", "MY_OWN": "$x", "UNRELATED": None, "WANDB_API_KEY": "k", "WORLD_SIZE": "2"}
    for rank in range(2):
        assert seen(tmp_path, rank) == matters | {"RANK": str(rank), "LOCAL_RANK": "0"}
    assert not list(tmp_path.glob(".deepy-*"))


def test_an_environment_variable_that_is_asked_for_and_not_set_is_an_error(tmp_path, programs):
    variables = ALLOCATION | {"PATH": os.environ["PATH"]}
    done = run(tmp_path, variables, num_gpus=2, forward_environment=["NOT_SET"])
    assert done.returncode == 2
    assert "forward_environment names NOT_SET, not set in this shell" in done.stderr
