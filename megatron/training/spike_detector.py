"""Which of a series of losses are far above those before."""

import math
import statistics
from collections import deque
from dataclasses import dataclass

# the standard deviation of a normal distribution, in median distances from its median
DEVIATIONS_PER_DISTANCE = 1.4826
# steps that a run may go back and still find the losses from before the checkpoint
REMEMBERED = 20_000
# of the median: the least deviation, so that a loss that hardly changes has no spikes by rounding
LEAST_DEVIATION = 1e-3


@dataclass(frozen=True)
class Jump:
    """A loss that is far above those before. distance: in deviations; infinite for a loss that is no number."""

    loss: float
    median: float
    deviation: float
    distance: float


class SpikeDetector:
    """Compares a loss with the median and the deviation of the losses before, both of which outliers hardly move.

    The deviation is 1.4826 times the median distance from the median (the scaled median absolute deviation).
    """

    def __init__(self, window: int, threshold: float) -> None:
        """window: losses that are kept; nothing is a spike before half of them are there. threshold: in deviations."""
        self.window, self.threshold = window, threshold
        self._losses: deque[float] = deque(maxlen=window)
        self._earlier: deque[tuple[int, float]] = deque(maxlen=window + REMEMBERED)  # with their steps

    def jump(self, loss: float, goes_on: bool = False) -> Jump | None:
        """How far `loss` is above those before, if that is more than the threshold.

        goes_on: whether the loss before was, too; then half of the threshold is enough.
        """
        if 2 * len(self._losses) < self.window:
            return None
        median = statistics.median(self._losses)
        distances = [abs(known - median) for known in self._losses]
        deviation = max(DEVIATIONS_PER_DISTANCE * statistics.median(distances), LEAST_DEVIATION * abs(median))
        if math.isfinite(loss) and (deviation or loss <= median):  # no deviation: all losses are 0
            distance = (loss - median) / (deviation or 1.0)
        else:
            distance = math.inf
        threshold = self.threshold / 2 if goes_on else self.threshold
        return Jump(loss, median, deviation, distance) if distance > threshold else None

    def add(self, step: int, loss: float) -> None:
        """Count the `loss` of a step among those that later ones are compared with, if it is a number."""
        if math.isfinite(loss):
            self._losses.append(loss)
            self._earlier.append((step, loss))

    def go_back(self, step: int) -> None:
        """Compare with the losses up to `step` again: later ones are lower, while a run still learns much.

        Where too few of them are known, as soon after a resume, the later ones stay.
        """
        while self._earlier and self._earlier[-1][0] > step:
            self._earlier.pop()
        if 2 * len(self._earlier) >= self.window:
            self._losses.clear()
            self._losses.extend(loss for _, loss in self._earlier)

    def forget(self) -> None:
        """Begin anew: the losses have reached another level."""
        self._losses.clear()
        self._earlier.clear()
