"""Hook: where the time of a step goes, with `wall_clock_breakdown`."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from megatron.engine.phases import Call
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run


class Stopwatch:
    """Seconds spent in each of several phases. The device finishes what it has to do before a phase begins and ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device

    def timed(self, phase: str, function: Call) -> Call:
        """`function`, whose time counts as that of `phase`."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.running(phase):
                return function(*arguments, **options)

        return call

    @contextmanager
    def running(self, phase: str) -> Iterator[None]:
        """The time that the block takes counts as that of `phase`."""
        started = self._now()
        yield
        self.seconds[phase] += self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Breakdown(Hook):
    """Seconds per step that this rank spends in each phase, as a mean over every `log_interval` steps."""

    def __init__(self, interval: int, watch: Stopwatch) -> None:
        """interval: in steps. watch: what times the phases of the engine."""
        self._interval, self._watch = interval, watch
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = 0

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """`batches`; the wait for each is timed, and what was timed between two steps (validation) is forgotten."""
        while True:
            self._watch.seconds.clear()
            with self._watch.running("data_wait"):
                batch = next(batches)
            yield batch

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """The phases' means where they are due."""
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
