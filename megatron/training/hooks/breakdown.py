"""Hook: time per phase of a step."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch

from megatron.checkpoint.state import TrainState
from megatron.engine.phases import DATA_WAIT, Call
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run

Moment = float | torch.cuda.Event


class Span(NamedTuple):
    """A stretch of time in a phase."""

    phase: str
    begin: Moment
    end: Moment


class Stopwatch:
    """Times phases: by the host's clock, or on a GPU by events in its stream, for which nothing waits."""

    def __init__(self, device: torch.device, waits: bool = False) -> None:
        """waits: the host waits for the device at the beginning and end of each phase, and its clock is used.

        That prevents overlap, and shows what each phase takes alone.
        """
        self.spans: list[Span] = []
        self._device, self._waits = device, waits

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
        begin = self._now()
        yield
        self.spans.append(Span(phase, begin, self._now()))

    def _now(self) -> Moment:
        if self._device.type == "cuda" and not self._waits:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def seconds_of(spans: list[Span]) -> dict[str, float]:
    """The sum of each phase. Waits for the last event."""
    total: dict[str, float] = defaultdict(float)
    if spans and isinstance(spans[-1].end, torch.cuda.Event):
        spans[-1].end.synchronize()
    for phase, begin, end in spans:
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            total[phase] += begin.elapsed_time(end) / 1000
        elif isinstance(begin, float) and isinstance(end, float):
            total[phase] += end - begin
    return total


class Breakdown(Hook):
    """Mean seconds per step and phase on this rank, every `log_interval` steps."""

    def __init__(self, interval: int, watch: Stopwatch) -> None:
        """interval: in steps. watch: times the phases of the engine."""
        self._interval, self._watch = interval, watch
        self._spans: list[Span] = []  # of the steps since the last means
        self._steps = 0

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Time the wait for each batch; discard what was timed between two steps (validation)."""
        while True:
            self._watch.spans.clear()
            with self._watch.running(DATA_WAIT):
                batch = next(batches)
            yield batch

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """The means of all phases if they are due."""
        self._steps += 1
        self._spans += self._watch.spans
        if not step.is_due(self._interval):
            return NOTHING
        sums = seconds_of(self._spans)
        means = {f"runtime/{phase}_seconds": total / self._steps for phase, total in sums.items()}
        self._spans, self._steps = [], 0
        return means

    def rewound(self, state: TrainState) -> None:
        """Drop what was timed since the last means."""
        self._spans, self._steps = [], 0


def breakdown(run: Run) -> Breakdown:
    """Registry entry: in every run. With `wall_clock_breakdown` the host waits for the device between phases."""
    watch = Stopwatch(run.engine.grid.device, waits=run.config.profiling.wall_clock_breakdown)
    run.engine.time_phases(watch.timed)
    return Breakdown(run.config.logging.log_interval, watch)
