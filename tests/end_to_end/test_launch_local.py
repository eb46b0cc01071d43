"""Real ranks, started by deepy.py: how they end, and what is said about it.

The ranks' programs are small scripts without torch; DeepSpeed's launcher in between takes some seconds to start.
"""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron.launch.main import main
from megatron.launch.protocol.environment import environment_line, rank_environment
from megatron.launch.protocol.records import read_node
from tests.end_to_end.processes import descendants, is_running, wait_for

ROOT = Path(__file__).parents[2]
SHAPE = """
num_layers: 2
hidden_size: 16
num_attention_heads: 2
seq_length: 8
train_iters: 1
train_batch_size: 2
data_impl: mock
num_gpus: 2
"""
PROGRAM = """
import os, signal, subprocess, sys, time
rank = os.environ["RANK"]
"""
# A rank that never ends by itself, with a child like those of a data loader; both may refuse to end.
HANGS = """
def hang(stubborn):
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # inherits what is ignored
    with open("processes", "a") as file:
        file.write(f"{os.getpid()} {child.pid}\\n")
    time.sleep(600)
"""

# A rank that DeepSpeed's launcher may end before the agent has seen the other one vanish.
ENDS_LATER = """
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), sys.exit()))
time.sleep(600)
"""


def start_program(folder, body, *arguments):
    """Write `body` as the ranks' program and start deepy.py on it."""
    (folder / "program.py").write_text(PROGRAM + HANGS + body)
    (folder / "shape.yml").write_text(SHAPE)
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "GLIBC_TUNABLES")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "deepy.py"), "program.py", "shape", *arguments],
        cwd=folder,
        env=kept | {"DS_ACCELERATOR": "cpu", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def start(tmp_path):
    return partial(start_program, tmp_path)


def finish(process):
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def hanging_processes(folder: Path, ranks: int) -> list[int]:
    """Wait until all ranks hang; their processes and those of their children."""
    file, deadline = folder / "processes", time.monotonic() + 120
    while time.monotonic() < deadline:
        found = file.read_text().split() if file.exists() else []
        if len(found) == 2 * ranks:
            return [int(process) for process in found]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def assert_all_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [process for process in processes if is_running(process)]


def test_a_run_gives_ranks_their_share_of_threads_their_logs_and_ends_with_0(start, tmp_path):
    body = """
from megatron.config.command_line import parse_command_line
config = parse_command_line(sys.argv[1:], script="program.py").merged
names = ("WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
print(rank, config.training.seed, *(os.environ[name] for name in names), os.environ["GLIBC_TUNABLES"].split(":")[0])
sys.stderr.write("progress\\r")
os.system("echo from a library in C")
print([folder for folder in sys.path if os.path.exists(os.path.join(folder, "evaluate.py"))])
"""
    code, out, err = finish(start(body, "seed=77", "log_dir=logs"))
    assert (code, err) == (0, "progress\n")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    line = f" 77 2 {threads} cpu -1,-1 glibc.malloc.arena_max=1\n"
    assert out == f"0{line}from a library in C\n[]\n"
    assert (tmp_path / "logs" / "rank_0.log").read_text() == f"0{line}[]\n"
    assert (tmp_path / "logs" / "rank_1.log").read_text() == f"1{line}progress\nfrom a library in C\n[]\n"


def test_what_the_user_has_set_for_threads_and_allocator_stays():
    own = {"OMP_NUM_THREADS": "7", "GLIBC_TUNABLES": "glibc.malloc.check=0"}
    assert rank_environment(own, "cpu", threads=2) == own | {"DS_ACCELERATOR": "cpu"}
    assert rank_environment({}, "cpu", threads=0)["OMP_NUM_THREADS"] == "1"


def test_a_rank_on_a_gpu_gets_segments_that_grow_and_the_allocator_of_the_system():
    assert rank_environment({}, "cuda", threads=2) == {
        "OMP_NUM_THREADS": "2",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "DS_ACCELERATOR": "cuda",
    }
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        own = {"OMP_NUM_THREADS": "7", name: "max_split_size_mb:64"}
        added = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "DS_ACCELERATOR": "cuda"}
        assert rank_environment(own, "cuda", threads=2) == own | added


def test_the_log_names_what_was_set_for_a_rank():
    line = environment_line(rank_environment({"HOME": "/root"}, "cuda", threads=2))
    assert (
        line
        == "environment: OMP_NUM_THREADS=2, PYTORCH_ALLOC_CONF=expandable_segments:True, CUDA_DEVICE_ORDER=PCI_BUS_ID"
    )
    assert environment_line({}) == "environment: OMP_NUM_THREADS, GLIBC_TUNABLES and PYTORCH_ALLOC_CONF are not set"


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The folder, exit code, output and errors of three ranks: one fails, one therefore, one would go on for long."""
    body = """
if rank == "1":
    raise ValueError("the cause")
if rank == "2":
    hang(False)
from pathlib import Path
from megatron.launch.protocol.heartbeat import RUN_FOLDER
from megatron.launch.protocol.records import read_ranks
while not any(one.code for one in read_ranks(Path(os.environ[RUN_FOLDER]))):
    time.sleep(0.01)
print("still said", file=sys.stderr)
raise RuntimeError("the consequence")
"""
    folder = tmp_path_factory.mktemp("failed")
    return folder, *finish(start_program(folder, body, "num_gpus=3", "train_batch_size=3"))


def test_an_exception_ends_the_other_rank_and_its_traceback_comes_last(failed):
    folder, code, out, err = failed
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"still said\nrank 1 of 3 failed:\nTraceback \(most recent call last\):\n  File .*program\.py.*\n.*\n(.*\^+\n)?"
        r"ValueError: the cause\n",
        err,
    ), err
    if (folder / "processes").exists():
        assert_all_end([int(process) for process in (folder / "processes").read_text().split()])


def test_the_first_failure_is_shown_and_not_those_that_follow_from_it(failed):
    _, code, _, err = failed
    assert code == 1
    assert "still said" in err
    assert err.endswith("ValueError: the cause\n")
    assert "the consequence" not in err


@pytest.mark.long  # as an exception, and as ranks that refuse to end at a signal
def test_an_exception_ends_a_rank_that_refuses_to_end(start, tmp_path):
    code, _, err = finish(start("if rank == '1':\n    raise ValueError('unhappy')\nhang(True)"))
    assert code == 1 and err.endswith("ValueError: unhappy\n")
    if (tmp_path / "processes").exists():
        assert_all_end([int(process) for process in (tmp_path / "processes").read_text().split()])


def test_ranks_that_find_the_input_wrong_say_it_once_and_end_with_2(start):
    code, out, err = finish(start("print('there is no such file', file=sys.stderr)\nsys.exit(2)"))
    assert (code, out, err) == (2, "", "there is no such file\n")


@pytest.mark.long  # all ranks that find the input wrong are a quick case
def test_a_log_that_cannot_be_written_is_named_with_2(start, tmp_path):
    (tmp_path / "logs" / "rank_1.log").mkdir(parents=True)
    code, _, err = finish(start("hang(False)", "log_dir=logs"))
    assert code == 2
    assert err == f"rank 1 of 2:\nthe log {tmp_path}/logs/rank_1.log cannot be written: Is a directory\n"


@pytest.mark.long  # as a log that cannot be written is
def test_one_rank_that_finds_the_input_wrong_is_heard(start):
    body = "if rank == '1':\n    print('not on this rank', file=sys.stderr)\n    sys.exit(2)\nhang(False)"
    code, _, err = finish(start(body))
    assert (code, err) == (2, "rank 1 of 2:\nnot on this rank\n")


@pytest.mark.long  # as one that is ended by a signal is
def test_a_rank_that_leaves_python_behind_is_named_with_its_code(start):
    body = f"if rank == '1':\n    print('last words')\n    os._exit(3)\n{ENDS_LATER}"
    code, _, err = finish(start(body))
    assert (code, err) == (1, "rank 1 ended with code 3 without a message\nits last lines:\nlast words\n")


def test_a_rank_ended_by_a_signal_is_named_with_the_signal_and_its_last_lines(start):
    body = f"if rank == '1':\n    print('last words')\n    os.kill(os.getpid(), signal.SIGKILL)\n{ENDS_LATER}"
    code, _, err = finish(start(body))
    assert code == 1
    assert err.startswith(
        "rank 1 was ended by SIGKILL: the machine did not run out of memory, so a scheduler or a person killed it\n"
    )
    assert err.endswith("last words\n")


@pytest.mark.long  # the second Ctrl-C of the next test ends ranks as stubborn, and test_stop has SIGTERM
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_deepy_ends_all_ranks_and_their_children(start, tmp_path, number):
    process = start("hang(stubborn=rank == '1')")
    processes = hanging_processes(tmp_path, ranks=2)
    process.send_signal(number)
    code, _, err = finish(process)
    assert (code, err) == (1, f"stopped by {number.name}\n")
    assert_all_end(processes)


def has_heartbeats(folder: Path, ranks: int) -> bool:
    """Whether the launcher has been told of the beats of all ranks."""
    runs = {path.parent for path in folder.glob("deepy-*/node_0.json")}
    nodes = [node for node in (read_node(run, 0) for run in runs) if node is not None]
    return any(sum(status.phase == "starting" for status in node.statuses) == ranks for node in nodes)


def test_a_second_ctrl_c_ends_ranks_that_do_not_reach_a_step_boundary(start, tmp_path):
    body = """
from megatron.launch.protocol.heartbeat import Heartbeat
signal.signal(signal.SIGINT, lambda *_: None)
beat = Heartbeat.of_this_process()
hang(stubborn=True)
"""
    process = start(body)
    processes = hanging_processes(tmp_path, ranks=2)
    wait_for(lambda: has_heartbeats(tmp_path, ranks=2), process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 1
    assert err == (
        "SIGINT: the run ends at the next step boundary, with a checkpoint; Ctrl-C ends it at once\nstopped by SIGINT\n"
    )
    assert_all_end(processes)


def test_no_rank_outlives_a_deepy_that_is_killed(start, tmp_path):
    process = start("hang(stubborn=False)")
    processes = hanging_processes(tmp_path, ranks=2)
    process.kill()
    finish(process)
    assert_all_end(processes)


def test_a_run_that_ends_while_deepspeed_starts_leaves_nothing(start):
    process = start("hang(False)")
    wait_for(lambda: descendants(process.pid), process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert (code, err) == (1, "stopped by SIGINT\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian.py"], 'there is no script "trian.py". Did you mean "train.py"?'),
        (["train.py", "shape", "train_batch_size=3"], "train_batch_size (3) must be divisible by"),
        (["train.py", "shape", "model_parallel_size=2", "num_gpus=3"], "3 ranks cannot be divided by"),
        (["train.py", "shape", "num_nodes=2"], "starts ranks on this machine only"),
        (["train.py", "shape", "save=shape.yml/x"], "log_dir (shape.yml/x/logs) cannot be made"),
        (["train.py", "shape", "launcher=pdssh"], 'unknown launcher "pdssh". Did you mean "pdsh"?'),
        (["train.py", "shape", "log_dir=/proc"], "log_dir (/proc) cannot be written to"),
        (["train.py", "shape", "-H", "hosts"], 'hosts:1: "-oProxyCommand=id" is not a host name or address'),
        (["train.py", "shape", "--dry-run", "-H", "hosts"], 'hosts:1: "-oProxyCommand=id" is not a host name'),
        (["train.py", "shape", "--dry-run", "-H", "gone"], "hostfile (gone) cannot be read: No such file"),
        (["train.py", "shape", "master_addr=-x"], 'master_addr: "-x" is not a host name or address'),
        (["train.py", "shape", "master_addr=node1:29500"], "must not hold a port; write the port as master_port"),
        (["train.py", "shape", "num_gpus=1000000000"], "num_gpus"),
        (["train.py", "nothing"], "there is no file nothing"),
    ],
)
def test_a_wrong_command_ends_with_2_before_anything_starts(tmp_path, arguments, message, monkeypatch, capsys):
    """In this process: the next test has the exit code of one of its own."""
    (tmp_path / "shape.yml").write_text(SHAPE)
    (tmp_path / "hosts").write_text("-oProxyCommand=id slots=2\nnode1 slots=2\n")
    monkeypatch.chdir(tmp_path)
    assert main(arguments, ROOT) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err


def test_a_working_folder_that_was_removed_is_said_to_be(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    command = f"cd {gone} && rmdir {gone} && exec {sys.executable} {ROOT}/deepy.py train.py {ROOT}/configs/default.yml"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "the working folder cannot be entered any more (No such file or directory); cd into another\n",
    )


@pytest.mark.parametrize("flag", ["--print-config", "--dry-run"])
def test_looking_at_a_configuration_starts_nothing_and_imports_no_torch(tmp_path, flag):
    (tmp_path / "shape.yml").write_text(SHAPE + "data_path: nowhere\nload: nowhere\nhostfile: nowhere\nnum_nodes: 1\n")
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['deepy.py', 'train.py', 'shape', {flag!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'deepy.py')!r}, run_name='__main__')\n"
        "except SystemExit as leaving:\n"
        "    assert leaving.code == 0, leaving.code\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"--print-config": "num_layers: 2\n", "--dry-run": "tokens per step: 16\n"}[flag] in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "shape.yml"]


@pytest.mark.long  # test_generation has the same with a real program
def test_rank_0_talks_with_the_terminal_and_ctrl_c_ends_the_run(tmp_path):
    (tmp_path / "program.py").write_text(
        PROGRAM + HANGS + "if rank == '0':\n    print('got', input('? '))\nhang(False)"
    )
    (tmp_path / "shape.yml").write_text(SHAPE)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        command = [sys.executable, str(ROOT / "deepy.py"), "program.py", "shape"]
        os.execve(sys.executable, command, os.environ | {"DS_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path)})
    assert read_until(terminal, b"? ")
    os.write(terminal, b"an answer\n")
    assert read_until(terminal, b"got an answer")
    processes = hanging_processes(tmp_path, ranks=2)
    os.write(terminal, b"\x03")
    assert read_until(terminal, b"stopped by SIGINT")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 1
    assert_all_end(processes)
    os.close(terminal)


def read_until(terminal: int, wanted: bytes) -> bool:
    """Whether `wanted` appears on the terminal within 40 seconds."""
    seen, deadline = b"", time.monotonic() + 120
    while wanted not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 1000)
    return wanted in seen
