"""Hook: report updates that `skip_update` has skipped."""

import math
from collections.abc import Mapping

from megatron.checkpoint.state import TrainState
from megatron.engine.deferred_read import DeferredScalar
from megatron.events import EventLog
from megatron.training.hooks.base import FinishedStep, Hook, Run
from megatron.training.reporting import report


class SkippedUpdates(Hook):
    """Reads norm and limit of a step while the next one is under way; the device has decided already."""

    def __init__(self, deviations: float, interval: int, events: EventLog | None = None) -> None:
        """deviations: the setting, for the message. interval: of metrics, in steps."""
        self._deviations, self._interval, self._events = deviations, interval, events or EventLog()
        self._before: tuple[int, DeferredScalar, DeferredScalar] | None = None
        self._count = 0

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Record skipped updates, and every `interval` steps how many there were since the last time."""
        assert step.output.norm_limit is not None
        if self._before:
            self._judge(*self._before)
        self._before = step.state.step, DeferredScalar(step.output.norm), DeferredScalar(step.output.norm_limit)
        if step.is_last:
            self._judge(*self._before)
            self._before = None
        if not step.is_due(self._interval):
            return {}
        count, self._count = self._count, 0
        return {"train/skipped_updates": count}

    def rewound(self, state: TrainState) -> None:
        """Forget what has not been judged."""
        self._before, self._count = None, 0

    def _judge(self, number: int, deferred_norm: DeferredScalar, deferred_limit: DeferredScalar) -> None:
        norm, limit = deferred_norm.read(), deferred_limit.read()
        if not math.isfinite(norm) or norm <= limit:
            return
        self._count += 1
        text = (
            f"the update of step {number} was skipped: its gradient norm, {norm:.4g}, is above {limit:.4g}, which is "
            f"{self._deviations:g} deviations above the median of the last norms (skip_update)"
        )
        report(self._events, "skipped_update", text, number, norm=norm, limit=limit)


def skipped_updates(run: Run) -> SkippedUpdates | None:
    """Registry entry: with `skip_update`."""
    deviations = run.config.recovery.skip_update
    if deviations is None:
        return None
    return SkippedUpdates(deviations, run.config.logging.log_interval, run.events)
