"""Time spent training, without the time that hooks take for validation and saving."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """A stopwatch for steps, which stops while a hook works."""

    def __init__(self, device: torch.device) -> None:
        """Start now. device: whose queued work is waited for before the watch is read."""
        self._device = device
        self._since = time.perf_counter()
        self._elapsed = 0.0

    def lap(self) -> float:
        """Seconds since the last lap, pauses left out; a new lap begins."""
        self._stop()
        seconds, self._elapsed = self._elapsed, 0.0
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time that the block takes."""
        self._stop()
        yield
        self._since = time.perf_counter()

    def _stop(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._since = now
