"""The progress of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. The next step reads samples from `consumed_samples` on, under any layout.

    Samples that were left out count as consumed, and their tokens do not.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_samples: tuple[tuple[int, int], ...] = ()  # left out after a loss spike: [first, end), one range a rewind

    @classmethod
    def of(cls, progress: Mapping[str, Any]) -> "TrainState":
        """As a checkpoint's progress.json has it. Raises KeyError, TypeError or ValueError where it does not."""
        step, samples, tokens = (int(progress[name]) for name in ("step", "consumed_samples", "consumed_tokens"))
        skipped = tuple((int(first), int(end)) for first, end in progress.get("skipped_samples", ()))
        return cls(step, samples, tokens, skipped)

    @property
    def has_gone_back_here_again(self) -> bool:
        """Whether two ranges were left out here one after the other, with no step between them and none since."""
        here = self.skipped_samples[-2:]
        return len(here) == 2 and here[0][1] == here[1][0] and here[1][1] == self.consumed_samples

    @property
    def trained_samples(self) -> int:
        """Consumed samples without those left out."""
        return self.consumed_samples - sum(end - first for first, end in self.skipped_samples)

    def after_step(self, samples: int, tokens: int) -> "TrainState":
        """The state after one more step over `samples` sequences with `tokens` labels."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
        )

    def leaving_out(self, end: int, earlier: tuple[tuple[int, int], ...] = ()) -> "TrainState":
        """The same step, with sample `end` as the next one.

        earlier: the ranges left out on the way that is given up, of which this state may have the first ones only. The
        range left out now contains the others, and is cut where they began: one range a rewind, which can be counted.
        """
        cuts = [self.consumed_samples, *(first for first, _ in earlier[len(self.skipped_samples) :]), end]
        return replace(self, consumed_samples=end, skipped_samples=(*self.skipped_samples, *pairwise(cuts)))
