"""Hook: the end of a run that makes no progress any more, because its gradients stay no numbers. Floor 6."""

from collections.abc import Mapping

from megatron.errors import RunError
from megatron.training.hooks import NOTHING, FinishedStep, Hook, Run

# A dynamic loss scale that starts far too high halves once in a few steps until it fits; that is no divergence.
PATIENCE = {"fp32": 10, "bf16": 10, "fp16": 100}


class Divergence(Hook):
    """Counts steps without an update. One bad batch is passed over; `patience` of them in a row end the run.

    The engine updates nothing from gradients that are no numbers, so the weights, and whatever was saved of them,
    are those from before.
    """

    def __init__(self, patience: int) -> None:
        """patience: steps in a row that may be skipped."""
        self._patience = patience
        self._skipped = 0

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Raise RunError when there have been too many skipped steps in a row."""
        self._skipped = self._skipped + 1 if step.output.skipped else 0
        if self._skipped >= self._patience:
            raise RunError(
                f"the training has diverged: the gradients of the last {self._skipped} steps, up to step "
                f"{step.state.step}, were not finite (loss {float(step.output.loss)}). "
                "A lower learning rate or a longer warm-up may help"
            )
        return NOTHING


def divergence(run: Run) -> Divergence:
    """Registry entry: in every run."""
    return Divergence(PATIENCE[run.plan.engine.precision])
