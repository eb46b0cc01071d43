"""Hook: report each finished step to the watchdog."""

from collections.abc import Mapping

from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run
from megatron.training.liveness import Liveness


class LivenessHook(Hook):
    """Reports each finished step to the watchdog."""

    def __init__(self, liveness: Liveness) -> None:
        self._liveness = liveness

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Send a heartbeat."""
        self._liveness.finished_step()
        return NOTHING


def liveness(run: Run) -> LivenessHook:
    """Registry entry: in every run."""
    return LivenessHook(run.liveness)
