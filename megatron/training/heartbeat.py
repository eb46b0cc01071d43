"""Hook: a beat after every step. Floor 6."""

from collections.abc import Mapping

from megatron.training.hooks import NOTHING, FinishedStep, Hook, Run
from megatron.training.pulse import Pulse


class HeartbeatHook(Hook):
    """Tells the pulse of each finished step."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Beat."""
        self._pulse.finished_step()
        return NOTHING


def heartbeat(run: Run) -> HeartbeatHook:
    """Registry entry: in every run."""
    return HeartbeatHook(run.pulse)
