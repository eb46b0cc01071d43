"""Report step and phase of this rank to the launcher's watchdog, which detects hangs and the rank that causes them."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

from megatron.launch.protocol.heartbeat import Heartbeat

T = TypeVar("T")
# steps in the running median
MEMORY = 50


class Liveness:
    """Sends a heartbeat at the beginning of each phase. Does nothing on a rank that deepy.py did not start."""

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        """heartbeat: the channel to the watchdog; None: send nothing."""
        self._heartbeat = heartbeat or Heartbeat(0, None)
        self._recent: deque[float] = deque(maxlen=MEMORY)
        self._median: float | None = None
        self._step = 0
        self._finished_at: float | None = None
        self.phase, self.since = "starting", time.monotonic()  # the present one
        self.seconds: dict[str, float] = {}  # of the host in each phase that has ended

    def begin(self, phase: str) -> None:
        """Report that a phase, such as "saving", begins or continues."""
        self._heartbeat.beat(phase, self._step, self._median)
        if phase != self.phase:
            now = time.monotonic()
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
            self.phase, self.since = phase, now

    def watched(self, batches: Iterator[T], done: int) -> Iterator[T]:
        """`batches`, with a heartbeat before and after each. done: steps before the first."""
        self._step = done
        while True:
            self._step += 1
            self.begin("data loading")
            batch = next(batches)
            self.begin("training step")
            yield batch

    def finished_step(self) -> None:
        """Record the time since the previous step finished, validation and saving included, and send a heartbeat.

        The first step of a run is not measured: it compiles and warms up.
        """
        now = time.monotonic()
        if self._finished_at is not None:
            self._recent.append(now - self._finished_at)
            self._median = statistics.median(self._recent)
        self._finished_at = now
        self.begin("after the step")
