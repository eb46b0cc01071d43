"""A group of processes that ends together: started in its own session, terminated as a whole.

In its own session the group gets no signals from the terminal: deepy.py alone decides about a stop.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

import psutil

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

    stdin, stderr: as for Popen. Raises OSError where the program cannot be started.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        # A scheduler may send signals that are meant for the ranks to all processes; by default they would die of them.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        if library is not None:
            library.prctl(PR_SET_PDEATHSIG, if_parent_dies)

    return subprocess.Popen(
        command, env=dict(environment), start_new_session=True, preexec_fn=prepare, stdin=stdin, stderr=stderr
    )


def stop_group(leader: "subprocess.Popen[bytes]", grace: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Terminate the group: SIGTERM, and SIGKILL after `grace` seconds, also to descendants outside the group.

    meanwhile: called again and again during the wait.
    """
    try:
        descendants = psutil.Process(leader.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    if _signal_group(leader.pid, signal.SIGTERM):
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and (leader.poll() is None or _signal_group(leader.pid, 0)):
            meanwhile()
            time.sleep(0.02)
        _signal_group(leader.pid, signal.SIGKILL)
    leader.wait()
    for process in descendants:  # such as the ssh of pdsh, each in its own session
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # kill() checks that it is still the same process
            process.kill()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a group; False if no process is left in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


class StopSignals:
    """A context in which signals that request a stop are noted in `received` instead of ending this process.

    SIGHUP stays ignored if it is already, because nohup keeps a run alive that way.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @property
    def urgent(self) -> bool:
        """Whether the run must end at once: after a hang-up, a second Ctrl-C, or a second SIGTERM.

        SIGTERM after SIGUSR1 is not urgent: schedulers send both when the time limit approaches.
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
