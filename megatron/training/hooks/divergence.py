"""Hook: end a run whose gradients have stopped being finite."""

import logging
import math
from collections.abc import Callable, Mapping

from megatron.checkpoint.state import TrainState
from megatron.engine.deferred_read import DeferredScalar
from megatron.errors import RunError
from megatron.events import EventLog
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run
from megatron.training.reporting import report
from megatron.training.sample_texts import keep_texts

log = logging.getLogger(__name__)

PATIENCE = 10
# fp16: a dynamic loss scale that starts far too high is halved every few steps until it fits.
PATIENCE_WHILE_THE_SCALE_FALLS = 100


class Divergence(Hook):
    """Counts steps without an update. One bad batch is tolerated; too many in a row end the run.

    The engine skips the update if gradients are not finite, so the weights, and all checkpoints, are from before. A
    step is judged while the next one is under way, so that the device is not synchronized; the last step at once.
    """

    def __init__(
        self,
        patience: int,
        write_batch: Callable[[TrainState], str] = lambda _: "",
        lowest_scale: float | None = None,
        events: EventLog | None = None,
    ) -> None:
        """patience: steps in a row that may be skipped. write_batch: stores the batch of a step and says where.

        lowest_scale: of fp16; while the loss scale is above it, more steps may be skipped, and none is an event.
        """
        self._patience = patience
        self._write_batch = write_batch
        self._lowest_scale, self._events = lowest_scale, events or EventLog()
        self._skipped = self._skipped_at_lowest = 0
        self._before: tuple[FinishedStep, DeferredScalar] | None = None

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Raise RunError when there have been too many skipped steps in a row."""
        if self._before:
            self._judge(*self._before)
        self._before = step, DeferredScalar(step.output.norm)
        if step.is_last:
            self._judge(*self._before)
        return NOTHING

    def rewound(self, state: TrainState) -> None:
        """Count anew."""
        self._skipped = self._skipped_at_lowest = 0
        self._before = None

    def _judge(self, step: FinishedStep, norm: DeferredScalar) -> None:
        skipped = not math.isfinite(norm.read())
        scale, lowest = step.output.loss_scale, self._lowest_scale
        falls = scale is not None and lowest is not None and scale > lowest
        self._skipped = self._skipped + 1 if skipped else 0
        self._skipped_at_lowest = self._skipped_at_lowest + 1 if skipped and not falls else 0
        if self._skipped_at_lowest == 1:  # of a row of them
            text = f"the gradients of step {step.state.step} were not finite, and the update was skipped"
            report(self._events, "not_finite", text, step.state.step)
        if self._skipped_at_lowest >= self._patience or self._skipped >= PATIENCE_WHILE_THE_SCALE_FALLS:
            with_scale = "" if scale is None else f", loss scale {scale:g}{'' if falls else ', which is its lowest'}"
            raise RunError(
                f"the training has diverged: the gradients of {self._skipped} steps in a row, up to step "
                f"{step.state.step}, were not finite (loss {float(step.output.loss)}{with_scale}). "
                f"A lower learning rate or a longer warm-up may help. {self._write_batch(step.state)}"
            )


def divergence(run: Run) -> Divergence:
    """Registry entry: in every run."""
    scale = run.plan.engine.loss_scale
    lowest = None if scale is None else scale.minimum if scale.dynamic else scale.initial
    return Divergence(PATIENCE, lambda state: keep_batch(run, state), lowest, run.events)


def keep_batch(run: Run, state: TrainState) -> str:
    """Write the samples of the step before `state` to the log folder; returns a sentence that says which and where."""
    numbers = range(state.consumed_samples - run.plan.batch.global_size, state.consumed_samples)
    return f"The last batch of them was {keep_texts(run, f'bad_batch_step_{state.step}.jsonl', numbers)}"


def keep_suspect_batch(run: Run, state: TrainState, step: int | None) -> None:
    """Write the batch of `step`, before the training goes on from `state` and perhaps fails there again.

    step: at which earlier attempts of this run failed; None, or one that is done: nothing is written.
    """
    if step is None or step <= state.step:
        return
    size = run.plan.batch.global_size
    end = state.consumed_samples + (step - state.step) * size
    words = keep_texts(run, f"bad_batch_step_{step}.jsonl", range(end - size, end))
    log.warning("the run has failed more than once in step %d, whose batch is %s", step, words)
