"""Which ranks are slow, from the times that all of them measured."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# In each phase: the least part of a step by which a slow rank is behind. An update is a small part of a step, and the
# only one in which no rank waits for another under any layout, so there less is enough.
LEAST_PART = {"data": 0.05, "forward": 0.05, "update": 0.01}
PHASES = tuple(LEAST_PART)
RATIO = 1.3  # of a slow rank's time to that of the others
INTERVALS = 3  # in a row, until a rank counts as slow, and until it no longer does


@dataclass(frozen=True)
class Times:
    """Seconds per step of one rank: its own in each phase, and the whole step, which is nearly the same for all."""

    data: float
    forward: float
    update: float
    step: float

    @property
    def own(self) -> float:
        """Seconds in all phases that are measured."""
        return self.data + self.forward + self.update


@dataclass(frozen=True)
class Slow:
    """A rank that is slow in a phase: its seconds per step there, and the median of the ranks that do the same work."""

    rank: int
    phase: str
    seconds: float
    others: float


class StragglerRule:
    """Finds ranks that are slow for INTERVALS intervals in a row, and forgets them after as many that are not."""

    def __init__(self, peers: Sequence[object]) -> None:
        """peers: for each rank, what the ranks that do the same work have in common: the stage of the pipeline."""
        self._peers = peers
        self._slow_for: dict[tuple[int, str], int] = {}  # intervals, of those that are not reported yet
        self._fine_for: dict[tuple[int, str], int] = {}  # intervals, of those that are

    def judge(self, times: Sequence[Times]) -> list[Slow]:
        """The ranks that have become stragglers with this interval. times: of each rank."""
        fresh = []
        for phase in PHASES:
            for rank in range(len(times)):
                found, key = self._slow(times, rank, phase), (rank, phase)
                if key in self._fine_for:
                    self._fine_for[key] = 0 if found else self._fine_for[key] + 1
                    if self._fine_for[key] == INTERVALS:
                        del self._fine_for[key]
                    continue
                self._slow_for[key] = self._slow_for.get(key, 0) + 1 if found else 0
                if found and self._slow_for[key] == INTERVALS:
                    self._slow_for[key] = self._fine_for[key] = 0
                    fresh.append(found)
        return fresh

    def _slow(self, times: Sequence[Times], rank: int, phase: str) -> Slow | None:
        others = [
            getattr(other, phase)
            for number, other in enumerate(times)
            if number != rank and self._peers[number] == self._peers[rank]
        ]
        if not others:
            return None
        mine, median = getattr(times[rank], phase), statistics.median(others)
        is_slow = mine > RATIO * median and mine - median > LEAST_PART[phase] * times[rank].step
        return Slow(rank, phase, mine, median) if is_slow else None
