"""Time spent training, without validation and saving; and time spent waiting for samples."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


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


class ReadingTime:
    """Seconds that this rank has waited for the loader of its samples, in which no rank waits for another."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watched(self, items: Iterator[T]) -> Iterator[T]:
        """`items`, which have no end, with the time that each takes added up."""
        while True:
            begun = time.perf_counter()
            item = next(items)
            self.seconds += time.perf_counter() - begun
            yield item
