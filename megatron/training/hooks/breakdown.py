"""Hook: time per phase of a step, with `wall_clock_breakdown`."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from megatron.engine.phases import DATA_WAIT, Call
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run


class Stopwatch:
    """Seconds spent in each of several phases. The device is synchronized at the beginning and end of each."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    def timed(self, phase: str, function: Call) -> Call:
        """Wrap `function` so that its time is added to `phase`."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.running(phase):
                return function(*arguments, **options)

        return call

    @contextmanager
    def running(self, phase: str) -> Iterator[None]:
        """Add the time of the block to `phase`."""
        started = self._now()
        yield
        self.seconds[phase] += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Breakdown(Hook):
    """Mean seconds per step and phase on this rank, every `log_interval` steps."""

    def __init__(self, interval: int, watch: Stopwatch) -> None:
        """interval: in steps. watch: times the phases of the engine."""
        self._interval, self._watch = interval, watch
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = 0

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Time the wait for each batch; discard what was timed between two steps (validation)."""
        while True:
            self._watch.seconds.clear()
            with self._watch.running(DATA_WAIT):
                batch = next(batches)
            yield batch

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """The means of all phases if they are due."""
        self._steps += 1
        for phase, seconds in self._watch.seconds.items():
            self._sums[phase] += seconds
        if not step.is_due(self._interval):
            return NOTHING
        means = {f"runtime/{phase}_seconds": total / self._steps for phase, total in self._sums.items()}
        self._sums.clear()
        self._steps = 0
        return means


def breakdown(run: Run) -> Breakdown | None:
    """Registry entry: with `wall_clock_breakdown`."""
    if not run.config.profiling.wall_clock_breakdown:
        return None
    watch = Stopwatch(run.engine.grid.device)
    run.engine.time_phases(watch.timed)
    return Breakdown(run.config.logging.log_interval, watch)
