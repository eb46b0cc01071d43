"""When a run ends before its time: a signal, or its limit of wall-clock time.

All ranks must end after the same step, or those that go on wait for the others for ever. So each step they vote, by a
maximum over one number. The vote begins when a step is done and is read when the next one is: it travels while that
step computes, so that neither a rank nor its device waits for it. The price is one step: a run ends with the step
after the one in which the signal comes.
"""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

# A rank's vote is a signal's number, or one of these.
GO_ON, TIME_LIMIT = 0, 1_000
UNDERSTOOD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """What this rank alone knows: a signal it got, and how long it may run."""

    def __init__(self, time_limit_minutes: float | None) -> None:
        """The time begins to run now."""
        self._deadline = time.monotonic() + 60 * time_limit_minutes if time_limit_minutes is not None else float("inf")
        self._signal = GO_ON

    @property
    def vote(self) -> int:
        """Why this rank wants to end: the number of a signal or TIME_LIMIT; GO_ON if it does not."""
        return self._signal or (TIME_LIMIT if time.monotonic() > self._deadline else GO_ON)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals instead of ending by them; a second Ctrl-C in this process ends it as always."""
        before = {number: signal.signal(number, self._note) for number in UNDERSTOOD}
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
    """What all ranks have agreed on."""

    def __init__(self, request: StopRequest, device: torch.device) -> None:
        """Collective over all ranks: the first vote begins."""
        self._request, self._device = request, device
        self.outcome = GO_ON
        self._begin()

    def after_step(self) -> bool:
        """Whether the step just done is the run's last one. Collective over all ranks, which get the same answer."""
        self._pending.wait()
        self.outcome = int(self._ballot)
        if self.outcome == GO_ON:
            self._begin()
        return self.outcome != GO_ON

    @property
    def reason(self) -> str | None:
        """Why the run ends early, in words; None: it does not."""
        if self.outcome == GO_ON:
            return None
        return "time_limit_minutes" if self.outcome == TIME_LIMIT else signal.Signals(self.outcome).name

    def _begin(self) -> None:
        self._ballot: Tensor = torch.tensor(self._request.vote, device=self._device)
        self._pending: dist.Work = dist.all_reduce(self._ballot, dist.ReduceOp.MAX, async_op=True)
