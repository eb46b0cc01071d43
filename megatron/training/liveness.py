"""Step and phase of this rank, for the watchdog of deepy.py, which tells a hang and who causes it."""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

from megatron.launch.protocol.heartbeat import Heartbeat

T = TypeVar("T")
# Steps whose times make the running median.
MEMORY = 50


class Liveness:
    """Beats whenever something new begins. On a rank that deepy.py did not start it costs and does nothing."""

    def __init__(self, heartbeat: Heartbeat | None = None) -> None:
        """Beat with `heartbeat`; None: with nothing."""
        self._heartbeat = heartbeat or Heartbeat(0, None)
        self._seconds: deque[float] = deque(maxlen=MEMORY)
        self._median: float | None = None
        self._step = 0
        self._finished_at: float | None = None

    def begin(self, phase: str) -> None:
        """A phase of work begins, such as "saving", or goes on."""
        self._heartbeat.beat(phase, self._step, self._median)

    def watched(self, batches: Iterator[T], done: int) -> Iterator[T]:
        """`batches`, with a beat before and after each. done: steps before the first."""
        self._step = done
        while True:
            self._step += 1
            self.begin("data loading")
            batch = next(batches)
            self.begin("training step")
            yield batch

    def finished_step(self) -> None:
        """Take the time since the last finished step, validation and saving between them included.

        The first step of a run warms up, and is no measure.
        """
        now = time.monotonic()
        if self._finished_at is not None:
            self._seconds.append(now - self._finished_at)
            self._median = statistics.median(self._seconds)
        self._finished_at = now
        self.begin("after the step")
