"""A group of processes that ends together: started in a session of its own, stopped as a whole.

Floor 2. The group's members get no signal from the terminal, so that it is deepy.py alone who decides about a stop.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

PR_SET_PDEATHSIG = 1


def start_group(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start `command` as the leader of a new session; it gets SIGTERM if this process dies, whatever kills it."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return subprocess.Popen(command, env=dict(environment), start_new_session=True, preexec_fn=die_with_parent)


def stop_group(leader: "subprocess.Popen[bytes]", grace: float) -> None:
    """End every process of the group: SIGTERM, after `grace` seconds SIGKILL."""
    if _signal_group(leader.pid, signal.SIGTERM):
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (leader.poll() is None or _signal_group(leader.pid, 0)):
            time.sleep(0.02)
        _signal_group(leader.pid, signal.SIGKILL)
    leader.wait()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a group; False if nobody is left in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class StopSignals:
    """While it is entered, SIGINT, SIGTERM and SIGHUP are noted in `received` instead of ending this process.

    SIGHUP stays ignored where it is, which is how nohup keeps a run alive.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __enter__(self) -> "StopSignals":
        noted = [signal.SIGINT, signal.SIGTERM]
        noted += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        self._before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
