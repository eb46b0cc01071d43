"""A group of processes that ends together: started in a session of its own, stopped as a whole.

The group's members get no signal from the terminal, so that it is deepy.py alone who decides about a stop.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1


def start_group(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    if_parent_dies: signal.Signals = signal.SIGTERM,
    stdin: int | None = None,
    stderr: int | None = None,
) -> "subprocess.Popen[bytes]":
    """Start `command` as the leader of a new session; it gets a signal if this process dies, whatever kills it.

    stdin, stderr: as for Popen.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        # A scheduler may send the signals meant for the ranks to everything; what does not know them must not die.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, if_parent_dies)

    return subprocess.Popen(
        command, env=dict(environment), start_new_session=True, preexec_fn=prepare, stdin=stdin, stderr=stderr
    )


def stop_group(leader: "subprocess.Popen[bytes]", grace: float) -> None:
    """End every process of the group: SIGTERM, after `grace` seconds SIGKILL, also for what left the group."""
    strays = {process: _born(process) for process in descendants(leader.pid)}
    if _signal_group(leader.pid, signal.SIGTERM):
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (leader.poll() is None or _signal_group(leader.pid, 0)):
            time.sleep(0.02)
        _signal_group(leader.pid, signal.SIGKILL)
    leader.wait()
    for process, born in strays.items():  # such as the ssh of pdsh, each in a session of its own
        if born is not None and _born(process) == born:  # and not another process that got its number
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    """All processes below `process`; none where there is no /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, front = [], [process]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found


def _born(process: int) -> str | None:
    """When a process began, in the kernel's ticks; None if it is not there."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a group; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class StopSignals:
    """While it is entered, the signals that ask for a stop are noted in `received` instead of ending this process.

    SIGHUP stays ignored where it is, which is how nohup keeps a run alive.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @property
    def urgent(self) -> bool:
        """Whether the run shall end at once: a hang-up, a second Ctrl-C, or SIGTERM twice.

        SIGUSR1 and then SIGTERM is what a scheduler sends as time runs out: the second adds nothing to the first.
        """
        again = signal.SIGINT in self.received[1:] or self.received.count(signal.SIGTERM) > 1
        return again or signal.SIGHUP in self.received

    def __enter__(self) -> "StopSignals":
        noted = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        noted += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        self._before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
