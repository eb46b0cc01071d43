"""End a run early: on a signal, or at its limit of wall-clock time. Or go back from a loss spike.

All ranks must act after the same step, or the others hang in their next collective. So they vote in each step, by
an all-reduce of the maximum over three numbers in host memory, which no device takes part in. It starts when a step
begins and is read when the host has launched the step. Hence a run ends one step after the one in which the signal
arrived.
"""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

# A rank's vote is the number of a signal, or one of these.
CONTINUE, TIME_LIMIT = 0, 1_000
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclass(frozen=True)
class Spike:
    """Consecutive steps with a loss that is far too high, by their numbers from 1."""

    first: int
    last: int


class StopRequest:
    """Why this rank wants to stop: a signal that it received, or its time limit."""

    def __init__(self, time_limit_minutes: float | None) -> None:
        """The time limit starts now."""
        self._deadline = time.monotonic() + 60 * time_limit_minutes if time_limit_minutes is not None else float("inf")
        self._signal = CONTINUE

    @property
    def vote(self) -> int:
        """The number of the signal received, TIME_LIMIT, or CONTINUE."""
        return self._signal or (TIME_LIMIT if time.monotonic() > self._deadline else CONTINUE)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record signals instead of ending at once; a second Ctrl-C raises KeyboardInterrupt as usual."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number


class StopVote:
    """Collective decision to stop, or to go back from a loss spike, made while a step computes.

    No vote is in flight between steps, when hooks act: torch's profiler, which one of them stops, corrupts memory if a
    collective is recorded meanwhile.
    """

    def __init__(self, request: StopRequest, group: dist.ProcessGroup | None = None) -> None:
        """group: all ranks, for tensors in host memory; None: the default group."""
        self._request, self._group = request, group
        self._pending: dist.Work | None = None
        self.outcome = CONTINUE
        self.spike: Spike | None = None

    def begin(self, spike: Spike | None = None) -> None:
        """Vote, as a step begins, on whether it is the last one. Collective over all ranks; does not wait.

        spike: to go back from after this step, if this rank asks for it.
        """
        asked = (spike.first, spike.last) if spike else (0, 0)
        self._ballot: Tensor = torch.tensor([self._request.vote, *asked])
        if dist.get_world_size() > 1:
            self._pending = dist.all_reduce(self._ballot, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def ends_run(self) -> bool:
        """Whether the step is the last one; the same on all ranks, as `spike` is from then on. Waits for the vote."""
        if self._pending is not None:
            self._pending.wait()
        self.outcome, first, last = self._ballot.tolist()
        self.spike = Spike(first, last) if first else None
        return self.outcome != CONTINUE

    @property
    def reason(self) -> str | None:
        """Why the run ends early; None if it does not."""
        if self.outcome == CONTINUE:
            return None
        return "time_limit_minutes" if self.outcome == TIME_LIMIT else signal.Signals(self.outcome).name
