"""One run on two hosts, started by one command on the first, over real ssh and a real wire."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.commands import SMALL, command, run
from tests.end_to_end.hosts import network, ssh_options, why_not
from tests.end_to_end.processes import end, is_running, started, steps_done, wait_for

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
MANY = "train_iters=100000"
SECRET = "not-for-the-eyes-of-ps"


@pytest.fixture
def hosts(tmp_path):
    keys = tmp_path / "ssh"
    keys.mkdir()
    with network(keys) as both:
        yield both, keys


@pytest.fixture
def folder(hosts, tmp_path, monkeypatch):
    """A folder with a model and a hostfile, and the environment with which ssh reaches the hosts."""
    both, keys = hosts
    (tmp_path / "small.yml").write_text(SMALL + "save: run\npipe_parallel_size: 2\n")
    (tmp_path / "hosts").write_text("# two\n" + "".join(f"{host.address} slots=1\n" for host in both))
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", ssh_options(keys))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin")
    return tmp_path


def on_first(hosts, folder: Path, *words: object):
    """deepy.py on the first host."""
    return started(folder, hosts[0][0].command(*command("deepy.py", "train.py", "small", "-H", "hosts", *words)))


def command_lines() -> list[bytes]:
    """Of all processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_bytes())
    return found


def test_a_pipeline_across_the_wire_trains_and_generates_from_its_checkpoint(hosts, folder):
    with on_first(hosts, folder, MANY) as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        ranks = [rank_of(number) for host in hosts[0] for number in host.processes() if rank_of(number)]
        seen = command_lines()
        code, out, err = end(process, signal.SIGTERM)
    assert code == 0, err
    assert [(rank["RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [("0", "2"), ("1", "2")]
    assert {rank["GLOO_SOCKET_IFNAME"] for rank in ranks} == {"eth0"}
    assert {rank["WANDB_API_KEY"] for rank in ranks} == {SECRET}
    assert not [words for words in seen if SECRET.encode() in words]
    assert "layout: 2 ranks = pipeline 2 x data 1 x tensor 1" in out
    step = steps_done(folder / "run")
    assert (folder / "run" / "latest").read_text() == f"global_step{step}"
    assert {path.name for path in (folder / "run" / "logs").glob("rank_*")} == {"rank_0.log", "rank_1.log"}
    assert not list((folder / "run" / "logs").glob(".deepy-*"))
    words = ("maximum_tokens=20", "temperature=1", "num_samples=4", "-o", "out.txt", "pipe_parallel_size=1")
    run(folder, "generate.py", "small", *words)
    texts = [json.loads(line) for line in (folder / "out.txt").read_text().splitlines()]
    assert len(texts) == 4
    assert sum(text["length"] for text in texts) > 0


def rank_of(process: int) -> dict[str, str]:
    """The environment of a process that is a rank, empty for any other."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    except OSError:
        return {}
    is_rank = len(words) > 2 and words[2].endswith(b"node/rank.py")
    return dict(line.split("=", 1) for line in variables if "=" in line) if is_rank else {}


@pytest.mark.long
def test_a_node_that_is_lost_ends_the_run_and_is_named(hosts, folder):
    with on_first(hosts, folder, MANY) as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        others = [number for number in hosts[0][0].processes() if rank_of(number)]
        hosts[0][1].kill_everything()
        started_at = time.monotonic()
        code, _, err = end(process)
        seconds = time.monotonic() - started_at
    assert code == 1
    assert seconds < 30
    assert f"lost the node {hosts[0][1].address}: its processes ended or it no longer answers" in err
    assert not [number for number in others if is_running(number)]


@pytest.mark.long
def test_no_rank_outlives_a_launcher_that_is_killed(hosts, folder):
    with on_first(hosts, folder, MANY) as process:
        wait_for(lambda: steps_done(folder / "run") >= 3, process)
        ranks = [number for host in hosts[0] for number in host.processes() if rank_of(number)]
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 15
        while any(map(is_running, ranks)) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert len(ranks) == 2
    assert not [number for number in ranks if is_running(number)]


@pytest.mark.long
def test_a_host_that_cannot_be_reached_is_named(hosts, folder):
    (folder / "hosts").write_text(f"{hosts[0][0].address} slots=1\n10.77.13.9 slots=1\n")
    with on_first(hosts, folder, MANY) as process:
        code, _, err = end(process)
    assert code == 1
    assert "cannot start on 10.77.13.9: its agent did not report (ssh exited with exit code 255)" in err


@pytest.mark.long
def test_the_first_failure_on_another_node_is_shown_with_its_host(hosts, folder):
    (folder / "program.py").write_text("import os\nif os.environ['RANK'] == '1':\n    raise ValueError('unhappy')\n")
    words = command("deepy.py", "program.py", "small", "-H", "hosts", MANY)
    with started(folder, hosts[0][0].command(*words)) as process:
        code, _, err = end(process)
    assert code == 1
    assert f"rank 1 of 2 on {hosts[0][1].address} failed:\nTraceback" in err
    assert err.endswith("ValueError: unhappy\n")
