"""Time spent training, without validation and saving."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """A stopwatch that hooks can pause."""

    def __init__(self, device: torch.device) -> None:
        """Start now. device: synchronized before each reading."""
        self._device = device
        self._since = time.perf_counter()
        self._elapsed = 0.0

    def lap(self) -> float:
        """Seconds since the last lap, without pauses; starts a new lap."""
        self._stop()
        seconds, self._elapsed = self._elapsed, 0.0
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block."""
        self._stop()
        yield
        self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._since = now
