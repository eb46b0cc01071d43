"""Commands that tests observe, signal and end while they run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.end_to_end.commands import ENVIRONMENT, command

PATIENCE = 300.0


@contextmanager
def started(folder: Path, words: list[str]) -> Iterator["subprocess.Popen[str]"]:
    """Start a command in `folder`; kill it at the end if it still runs."""
    process = subprocess.Popen(
        words,
        cwd=folder,
        env=os.environ | ENVIRONMENT | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pipesize=1 << 20,  # nobody reads while a test waits
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=PATIENCE)


@contextmanager
def deepy(folder: Path, *words: object) -> Iterator["subprocess.Popen[str]"]:
    with started(folder, command("deepy.py", *words)) as process:
        yield process


def end(process: "subprocess.Popen[str]", number: signal.Signals | None = None) -> tuple[int, str, str]:
    """Signal a command and wait for its end: exit code, stdout, stderr."""
    if number is not None:
        process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"the condition was not met within {PATIENCE:.0f} s"
        time.sleep(0.05)


def steps_done(save: Path) -> int:
    metrics = save / "logs" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def process_of_rank(rank: int, run: "subprocess.Popen[str]") -> int:
    """The process of a rank, found among the descendants of a run by its command and environment."""
    for number in descendants(run.pid):
        try:
            words = Path(f"/proc/{number}/cmdline").read_bytes()
            variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
            parent = Path(f"/proc/{parent_of(number)}/cmdline").read_bytes()
        except OSError:
            continue
        if b"rank.py" in words and b"deepspeed.launcher" in parent and f"RANK={rank}".encode() in variables:
            return number
    raise AssertionError(f"there is no rank {rank}")


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(process: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = parent_of(int(path.name))
        except OSError:
            continue
    found, front = [], [process]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
