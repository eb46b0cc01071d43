"""The progress of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Progress of a run. The next step reads samples from `consumed_samples` on, under any layout."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def after_step(self, samples: int, tokens: int) -> "TrainState":
        """The state after one more step over `samples` sequences with `tokens` labels."""
        return TrainState(self.step + 1, self.consumed_samples + samples, self.consumed_tokens + tokens)
