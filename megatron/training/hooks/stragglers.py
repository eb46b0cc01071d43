"""Hook: find ranks that are slower than those that do the same work, and say in which phase.

Ranks wait for each other in every step, so a step takes equally long on all of them. What differs is the time that a
rank needs by itself, and that can only be measured where it waits for no other:

data        waiting for the loader of this rank's samples: never waits for a rank
forward     the forward pass: waits for the ranks with which it shares a replica (tensor and context parallelism, and
            under ZeRO 3 for all), which then are as slow as the slowest of them
update      the optimizer's update of this rank's own weights: never waits, but is short

A slow device is slow in the forward pass and in the update; where the forward pass cannot tell the ranks of a replica
apart, the update can. A slow network is seen by none of these.
"""

import socket
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.state import TrainState
from megatron.engine.phases import FORWARD, Call
from megatron.events import EventLog
from megatron.parallel.grid import ParallelGrid
from megatron.training.clock import ReadingTime
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run
from megatron.training.reporting import report
from megatron.training.straggler_rule import INTERVALS, PHASES, Slow, StragglerRule, Times

MOST_EVENTS = 20  # by one process
LEAST_STEPS = 10  # in an interval
DOING = {"data": "reading data", "forward": "the forward pass", "update": "the optimizer's update"}


class Spans:
    """Adds up the time between beginnings and ends, on the device's clock, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        """device: of the work between a beginning and its end."""
        self.seconds = 0.0
        self.is_open = False  # whether beginnings count: not those of validations
        self._on_gpu = device.type == "cuda"
        self._begun: Any = None
        self._ended: deque[tuple[Any, Any]] = deque()

    def begin(self, *_: object) -> None:
        """Start a span."""
        self._begun = self._now() if self.is_open else None

    def end(self, *_: object) -> None:
        """End the span."""
        if self._begun is not None:
            self._ended.append((self._begun, self._now()))
            self._begun = None

    def collect(self) -> None:
        """Add the spans that the device has finished to `seconds`."""
        while self._ended and (not self._on_gpu or self._ended[0][1].query()):
            begun, ended = self._ended.popleft()
            self.seconds += begun.elapsed_time(ended) / 1000 if self._on_gpu else ended - begun

    def timed(self, phase: str, function: Call) -> Call:
        """Wrap `function` if it is the forward pass."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            self.begin()
            try:
                return function(*arguments, **options)
            finally:
                self.end()

        return call if phase == FORWARD else function

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class StepTimes:
    """The times of this rank since they were last taken."""

    def __init__(self, device: torch.device, reading: ReadingTime) -> None:
        """device: of this rank. reading: counts the time of its loader."""
        self.forward, self.update = Spans(device), Spans(device)
        self._reading, self._read = reading, reading.seconds
        self._steps: list[float] = []  # seconds from beginning to beginning
        self._begun: float | None = None

    def begin_step(self) -> None:
        """A step begins: its samples are about to be read."""
        now = time.perf_counter()
        if self._begun is not None:
            self._steps.append(now - self._begun)
        self._begun = now
        self.forward.is_open = self.update.is_open = True

    def end_step(self) -> None:
        """The host has launched the step."""
        for spans in (self.forward, self.update):
            spans.is_open = False
            spans.collect()

    def take(self) -> list[float]:
        """Seconds per step, in the order of `Times`, and start anew. Of whole steps the median: some also save."""
        steps = max(len(self._steps), 1)
        sums = (self._reading.seconds - self._read, self.forward.seconds, self.update.seconds)
        taken = [*(seconds / steps for seconds in sums), statistics.median(self._steps or [0.0])]
        self._read, self.forward.seconds, self.update.seconds, self._steps = self._reading.seconds, 0.0, 0.0, []
        return taken


class Stragglers(Hook):
    """Exchanges the times of all ranks once per interval, while the next step computes."""

    def __init__(
        self, grid: ParallelGrid, times: StepTimes, interval: int, nodes: list[str], events: EventLog | None = None
    ) -> None:
        """interval: of metrics, in steps. nodes: name of the node of each rank."""
        self._grid, self._times, self._nodes = grid, times, nodes
        self._metrics_interval, self._interval = interval, interval * -(-LEAST_STEPS // interval)
        self._rule = StragglerRule(_stages(grid))
        self._events = events or EventLog()
        self._reported = 0
        self._is_due = False
        self._pending: tuple[Tensor, dist.Work | None] | None = None
        self._metrics: Mapping[str, float] = NOTHING

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Begin an exchange that is due as a step begins: none may be in flight between steps, when hooks act."""
        while True:
            self._times.begin_step()
            if self._is_due:
                self._exchange()
            yield next(batches)

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Judge what was exchanged during the step; return the figures of an interval with the next metrics."""
        self._times.end_step()
        if self._pending is not None:
            table, work = self._pending
            if work is not None:
                work.wait()
            self._pending = None
            self._judge([Times(*row) for row in table.tolist()], step.state.step)
        self._is_due = step.state.step % self._interval == 0
        if not step.is_due(self._metrics_interval):
            return NOTHING
        metrics, self._metrics = self._metrics, NOTHING
        return metrics

    def rewound(self, state: TrainState) -> None:
        """Start a new interval."""
        self._times.take()
        self._is_due = False

    def _exchange(self) -> None:
        """Each rank fills its row of a table; the sum is the table of all. In host memory, without waiting."""
        table = torch.zeros(dist.get_world_size(), len(PHASES) + 1, dtype=torch.float64)
        table[dist.get_rank()] = torch.tensor(self._times.take(), dtype=torch.float64)
        self._pending = table, dist.all_reduce(table, group=self._grid.host_group, async_op=True)

    def _judge(self, times: list[Times], step: int) -> None:
        slowest = max(range(len(times)), key=lambda rank: times[rank].own)
        fastest = min(each.own for each in times)
        self._metrics = {
            "runtime/slowest_rank": slowest,
            "runtime/slowest_rank_seconds": times[slowest].own,
            "runtime/fastest_rank_seconds": fastest,
        }
        found = self._rule.judge(times)
        for phase in PHASES:
            if slow := [each for each in found if each.phase == phase]:
                self._report(phase, slow, times, step)

    def _report(self, phase: str, slow: list[Slow], times: list[Times], step: int) -> None:
        self._reported += 1
        if self._reported > MOST_EVENTS:
            return
        ranks = [each.rank for each in slow]
        nodes = sorted({self._nodes[rank] for rank in ranks})
        worst = max(slow, key=lambda each: each.seconds)
        text = (
            f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} on {', '.join(nodes)} "
            f"{'is' if len(ranks) == 1 else 'are'} slow in {DOING[phase]}: {1000 * worst.seconds:.1f} ms a step, where "
            f"the others take {1000 * worst.others:.1f} ms, in {INTERVALS} intervals of {self._interval} steps in a "
            f"row; a step takes {1000 * times[worst.rank].step:.1f} ms"
        )
        if self._reported == MOST_EVENTS:
            text += "; no more of this is reported"
        report(
            self._events,
            "straggler",
            text,
            step,
            ranks=ranks,
            nodes=nodes,
            phase=phase,
            seconds=worst.seconds,
            others=worst.others,
        )


def _stages(grid: ParallelGrid) -> list[int]:
    """The pipeline stage of each rank, in the order of ranks."""
    table = grid.mesh.mesh
    stages = torch.empty(table.numel(), dtype=torch.int64)
    stages[table.flatten()] = torch.arange(table.shape[0]).repeat_interleave(table[0].numel())
    return stages.tolist()


def stragglers(run: Run) -> Stragglers | None:
    """Registry entry: with `watch_stragglers`, if there are several ranks. Collective."""
    engine, world = run.engine, dist.get_world_size()
    if not run.config.recovery.watch_stragglers or world == 1:
        return None
    nodes: list[Any] = [None] * world
    dist.all_gather_object(nodes, socket.gethostname(), group=engine.grid.host_group)
    times = StepTimes(engine.grid.device, run.reading)
    engine.time_phases(times.forward.timed)
    engine.time_update(times.update.begin, times.update.end)
    return Stragglers(engine.grid, times, run.config.logging.log_interval, nodes, run.events)
