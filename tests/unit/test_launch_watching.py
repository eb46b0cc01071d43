"""Hangs, stops and ends as the launcher understands them, without processes."""

import errno
import signal
import socket
import subprocess
import sys
import time

import pytest

from megatron.errors import UserError
from megatron.launch import node_states
from megatron.launch.failure_causes import cause_in_words, death_in_words
from megatron.launch.node import network as node_network
from megatron.launch.node.network import interface_towards
from megatron.launch.node_states import NodeStates
from megatron.launch.process_group import StopSignals
from megatron.launch.protocol import records
from megatron.launch.protocol.environment import forwarded_environment
from megatron.launch.protocol.heartbeat import Heartbeat, RankStatus, read_rank_status
from megatron.launch.protocol.records import (
    NodeRecord,
    RankRecord,
    RankStacks,
    look_at_ranks,
    write_node,
    write_rank,
)
from megatron.launch.rollcall import roll_call
from megatron.launch.watchdog import Watchdog

MAIN = """  File "/repo/megatron/training/loop.py", line 38 in train_steps
  File "/repo/train.py", line 14 in <module>
  File "<frozen runpy>", line 88 in _run_code
  File "/repo/megatron/launch/node/rank.py", line 99 in main
  File "/repo/megatron/launch/node/rank.py", line 170 in <module>
"""
OTHER = """Thread 0x00007f (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007e (most recent call first):
"""
WAITS = """  File "/venv/site-packages/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/venv/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/venv/site-packages/deepspeed/runtime/engine.py", line 2600 in _take_model_step
"""
LOADS = """  File "/repo/megatron/data/windows.py", line 88 in __getitem__
  File "/venv/site-packages/torch/utils/data/_utils/fetch.py", line 52 in fetch
"""


def status(rank=0, step=1201, phase="training step", age=0.0, median=1.0):
    return RankStatus(rank, step, phase, age, median)


def test_the_roll_call_puts_together_who_does_the_same_and_names_the_odd_one():
    statuses = {rank: status(rank, phase="data loading" if rank == 1 else "training step") for rank in range(4)}
    stacks = [RankStacks(rank, "S", OTHER + (LOADS if rank == 1 else WAITS) + MAIN) for rank in range(4)]
    assert roll_call(statuses, stacks, dict.fromkeys(range(4), "here")) == (
        "ranks 0, 2, 3 wait in all_reduce (optimizer step, step 1201); "
        "rank 1 is in data loading (windows.py:88, step 1201)"
    )


def test_the_roll_call_names_hosts_where_there_are_several_and_ranks_that_do_not_answer():
    statuses = {rank: status(rank) for rank in range(3)}
    stacks = [RankStacks(0, "S", WAITS + MAIN), RankStacks(1, "T", ""), RankStacks(2, "D", "")]
    assert roll_call(statuses, stacks, {0: "node1", 1: "node1", 2: "node2"}) == (
        "rank 0 on node1 waits in all_reduce (optimizer step, step 1201); "
        "rank 1 on node1 is stopped by a signal or a debugger (training step, step 1201); "
        "rank 2 on node2 does not answer (training step, step 1201)"
    )


@pytest.mark.parametrize(
    ("timeout", "seen", "limit"),
    [
        (None, status(median=1.0), 300),
        (None, status(median=60.0), 600),
        (None, status(median=None), 900),
        (None, status(median=200.0, phase="saving"), 2000),
        (5.0, status(median=60.0), 5),
        (5.0, status(median=60.0, phase="saving"), 900),
        (0.0, status(), float("inf")),
        (5.0, status(median=None, phase="conversing"), float("inf")),
    ],
)
def test_a_step_may_take_ten_medians_and_five_minutes_unless_the_timeout_says_otherwise(timeout, seen, limit):
    assert Watchdog(timeout).limit(seen) == limit


def test_the_watchdog_reports_the_rank_that_is_silent_for_longest_once_for_each_step():
    dog = Watchdog(5.0)
    assert dog.find_hung_rank([status(0, age=4.9), status(1, age=0.1)]) is None
    hanging = [status(0, age=5.5), status(1, age=6.0)]
    assert dog.find_hung_rank(hanging) == hanging[1]
    assert dog.find_hung_rank(hanging) is None
    assert dog.find_hung_rank([status(0, step=1202, age=7.0)]) is not None


def test_ranks_that_wait_for_a_hung_one_are_no_second_hang():
    dog = Watchdog(5.0)
    waiting = [status(0, phase="validation", age=4.9), status(1, age=5.5)]
    assert dog.find_hung_rank(waiting) == waiting[1]
    assert dog.find_hung_rank([status(0, phase="validation", age=5.1), status(1, age=5.7)]) is None
    assert dog.find_hung_rank([status(0, step=1202, age=5.1), status(1, step=1202, age=5.0)]) is not None


def test_a_rank_that_leaves_its_record_while_its_process_is_looked_at_has_not_vanished(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as ended:
        pass
    record = RankRecord(0, ended.pid)
    write_rank(tmp_path, record)
    assert look_at_ranks(tmp_path) == ([record], [record])
    fate, last = records._fate, record.ended(0, "exit", "")

    def leaves_its_record_first(process):
        write_rank(tmp_path, last)
        return fate(process)

    monkeypatch.setattr(records, "_fate", leaves_its_record_first)
    assert look_at_ranks(tmp_path) == ([last], [])


class FrozenTime:
    """A clock of nodes that a test moves on."""

    def __init__(self, monkeypatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(node_states, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_a_node_is_not_lost_while_nothing_can_be_written_where_it_reports(tmp_path, monkeypatch, capsys):
    time = FrozenTime(monkeypatch)
    write_node(tmp_path, NodeRecord(0, "far", beat=1, statuses=(status(age=1.0),)))
    nodes = NodeStates(tmp_path, ["far"], remote=True)
    nodes.update()

    def are_lost_after(seconds):
        time.now += seconds
        nodes.update()
        return [node.host for node in nodes.lost(seconds / 2)]

    assert are_lost_after(10) == ["far"]
    write_node(tmp_path, NodeRecord(0, "far", beat=2, statuses=(status(age=1.0),)))
    nodes.update()
    (tmp_path / node_states.PROBE).symlink_to("/dev/full")
    assert are_lost_after(10) == are_lost_after(10) == []
    assert nodes.statuses[0].age == 1.0
    assert capsys.readouterr().err.count("cannot be written to (No space left on device)") == 1
    (tmp_path / node_states.PROBE).unlink()
    assert are_lost_after(10) == ["far"]


def test_a_folder_that_cannot_be_written_to_is_told_of_once(tmp_path, monkeypatch, capsys):
    time = FrozenTime(monkeypatch)
    write_node(tmp_path, NodeRecord(0, "far", beat=1))
    nodes = NodeStates(tmp_path, ["far"], remote=True)
    (tmp_path / node_states.PROBE).symlink_to("/dev/full")
    for _ in range(40):
        time.now += 1
        nodes.update()
    assert not nodes.lost(5)
    assert capsys.readouterr().err.count("is not known") == 1


def test_a_node_is_not_lost_because_its_record_took_long_to_read(tmp_path, monkeypatch, capsys):
    time = FrozenTime(monkeypatch)
    write_node(tmp_path, NodeRecord(0, "far", beat=1))
    nodes = NodeStates(tmp_path, ["far"], remote=True)
    nodes.update()
    monkeypatch.setattr(node_states, "SLOW_SECONDS", -1.0)  # any reading takes longer
    time.now += 10
    assert nodes.lost(5)
    nodes.update()
    assert not nodes.lost(5)
    assert "did not answer for 0 s" in capsys.readouterr().err


def test_a_heartbeat_is_read_by_others_and_ages(tmp_path):
    assert read_rank_status(tmp_path, 3) is None
    heart = Heartbeat(3, tmp_path)
    assert read_rank_status(tmp_path, 3) == RankStatus(3, 0, "starting", pytest.approx(0, abs=1), None)
    heart.beat("data loading", 12, 0.25)
    time.sleep(0.05)
    seen = read_rank_status(tmp_path, 3)
    assert (seen.step, seen.phase, seen.median) == (12, "data loading", 0.25)
    assert 0.05 <= seen.age < 1
    Heartbeat(0, None).beat("anything", 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "the GPU's memory is used up"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "shared memory"),
        ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.", "lower num_workers"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "the machine's memory is used up"),
        ("[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5", "a collective timed out"),
        ("torch.distributed.DistBackendError: NCCL error ... Connection closed by peer", "lost its connection"),
        # of the store, while the process group is set up
        ("DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the ...", "ended first"),
        ("DistNetworkError: The client socket has timed out after 1800000ms while trying to", "ended first"),
        ("RuntimeError: The server socket has failed to listen (errno: 98 - Address already in use)", "master_port"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        ("ValueError: rank one is unhappy", None),
    ],
)
def test_the_cause_of_a_failure_is_said_in_words(text, words):
    found = cause_in_words(f"Traceback\n  ...\n{text}")
    assert found is None if words is None else words in found


def test_the_death_of_a_rank_is_said_in_words():
    assert "ran out of memory" in death_in_words(-9, out_of_memory=True)
    assert "scheduler or a person" in death_in_words(-9)
    assert "/dev/shm" in death_in_words(-signal.SIGBUS)
    assert death_in_words(3) == "ended with code 3 without a message"


def test_a_second_request_is_urgent_but_not_what_a_scheduler_sends_when_time_runs_out():
    for signals, urgent in (
        ([signal.SIGTERM], False),
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGTERM], True),
        ([signal.SIGUSR1, signal.SIGTERM], False),
        ([signal.SIGUSR1, signal.SIGUSR1], False),
    ):
        stop = StopSignals()
        stop.received = signals
        assert stop.urgent == urgent


def test_what_matters_travels_and_the_machines_own_stays(tmp_path):
    here = {
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "t",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0",
        "MINE": "1",
        "PATH": "/bin",
    }
    (tmp_path / ".deepspeed_env").write_text('# ours\nNCCL_DEBUG=WARN\nexport OWN="a b"\n')
    assert forwarded_environment(here, [], []) == {"NCCL_DEBUG": "INFO", "HF_TOKEN": "t", "PATH": "/bin"}
    assert forwarded_environment(here, ["MINE"], [tmp_path / "nowhere", tmp_path]) == {
        **{"NCCL_DEBUG": "WARN", "HF_TOKEN": "t", "PATH": "/bin"},
        **{"MINE": "1", "OWN": "a b"},
    }
    with pytest.raises(UserError, match="forward_environment names GONE"):
        forwarded_environment(here, ["GONE"], [])
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG\n")
    with pytest.raises(UserError, match=r"deepspeed_env:1: \"NCCL_DEBUG\" must be NAME=value"):
        forwarded_environment(here, [], [tmp_path])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_an_environment_file_of_any_editor_has_the_variables_that_it_shows(tmp_path, encoding):
    text = "A=1\r\n\texport  B='two words'\r\nC=\"it's\"\r\nD=it's\r\nE='\r\nF=gr\u00fc\u00dfe\tx=y\r\nG=\r\n"
    (tmp_path / ".deepspeed_env").write_bytes(text.encode(encoding))
    seen = {"A": "1", "B": "two words", "C": "it's", "D": "it's", "E": "'", "F": "gr\u00fc\u00dfe\tx=y", "G": ""}
    assert forwarded_environment({}, [], [tmp_path]) == seen


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("A=Büro\n".encode("latin-1"), r"the environment file \(.*\) is not UTF-8: byte 3"),
        (b"\x7fELF\x00\x00", "is a program, not UTF-8 text"),
        (b"A=1\0" + b"2" * 90 + b"\n", r"env:1: A has the control character '\\x00'"),
        ("\u00c4=1\n".encode(), "env:1: .* must be NAME=value"),
        (b"A\nB\n", "env:1: .*\n.*env:2: "),
    ],
)
def test_an_environment_file_that_cannot_be_used_is_refused_with_the_line(tmp_path, data, message):
    (tmp_path / ".deepspeed_env").write_bytes(data)
    with pytest.raises(UserError, match=message):
        forwarded_environment({}, [], [tmp_path])


def test_names_that_no_resolver_takes_have_no_interface():
    assert interface_towards("a..b") is None
    assert interface_towards("a" * 70) is None


def test_the_interface_towards_this_machine_is_its_loopback():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


@pytest.mark.parametrize(
    "connections, taken, found",
    [
        ((26_000, 60_999), [], range(20_000, 26_000)),
        ((20_000, 31_999), range(32_000, 32_767), [32_767]),
        ((1_024, 65_535), [], range(1_024, 65_536)),  # there is no other
    ],
)
def test_the_port_of_rank_0_is_free_and_no_connection_gets_it(connections, taken, found, tmp_path, monkeypatch):
    monkeypatch.setattr(node_network, "CONNECTION_PORTS", tmp_path / "range")
    (tmp_path / "range").write_text("\t".join(map(str, connections)) + "\n")
    real = socket.socket.bind

    def bind(self, address):
        if address[1] in taken:
            raise OSError(errno.EADDRINUSE, "Address already in use")
        real(self, address)

    monkeypatch.setattr(node_network.socket, "socket", type("Probe", (socket.socket,), {"bind": bind}))
    assert node_network.free_port() in found
