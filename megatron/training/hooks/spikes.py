"""Hook: find loss spikes, report them, and ask to go back where `on_loss_spike` says so."""

import logging
import math
from collections.abc import Callable, Mapping

from megatron.checkpoint.state import TrainState
from megatron.config.schema.recovery_keys import RecoveryKeys
from megatron.engine.deferred_read import DeferredScalar
from megatron.events import EventLog
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run
from megatron.training.reporting import report
from megatron.training.sample_texts import keep_texts
from megatron.training.spike_detector import Jump, SpikeDetector
from megatron.training.stopping import Spike

log = logging.getLogger(__name__)

SETTLED = 2  # losses in a row without a jump, which end a spike
MOST_FILES = 20  # with the samples of spikes, by one process


class LossSpikes(Hook):
    """Judges the loss of a step while the next one is under way, so that the device is not synchronized.

    A spike begins with a jump of the loss. It ends when the loss has settled within half of the threshold, or after
    some steps in any case, and only then the run may go back, because only then it is known which samples to leave out.
    It does not where the updates of all its steps were skipped, which left the weights as they were.
    """

    def __init__(
        self,
        keys: RecoveryKeys,
        events: EventLog | None = None,
        keep_batch: Callable[[TrainState], str] = lambda _: "",
    ) -> None:
        """keep_batch: stores the samples of the step before a state, and says which they are and where."""
        self._keys, self._events, self._keep_batch = keys, events or EventLog(), keep_batch
        self._detector = SpikeDetector(keys.loss_spike_window, keys.loss_spike_threshold)
        self._before: _Judged | None = None
        self._spike: Spike | None = None  # under way
        self._settled = self._files = 0
        self._has_updated = False  # whether a step of the spike has changed the weights
        self.asked: Spike | None = None  # to go back from, on this rank

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Judge the step before, and the last step of a run at once."""
        if self._before:
            self._judge(self._before)
        self._before = _Judged(step)
        if step.is_last:
            self._judge(self._before)
            self._before = None
        return NOTHING

    def rewound(self, state: TrainState) -> None:
        """Look for the next spike, by the losses up to where the run goes on."""
        self._before = self._spike = self.asked = None
        self._settled = 0
        self._detector.go_back(state.step)

    def give_up(self) -> None:
        """Stay with the losses as they are, where there is no checkpoint to go back to."""
        self._end(new_level=True)
        self.asked = None

    def close(self) -> None:
        """Warn if the run ends within a spike, which its last checkpoint then holds."""
        if self._spike is not None:
            log.info("the run ends within the loss spike that began at step %d", self._spike.first)

    def _judge(self, judged: "_Judged") -> None:
        if self.asked is not None:
            return
        step, loss = judged.step, judged.loss.read()
        number = step.state.step
        jump = self._detector.jump(loss, goes_on=self._spike is not None)
        if jump is None and self._spike is None:
            self._detector.add(number, loss)
            return
        if jump is not None:
            self._settled = 0
            if self._spike is None:
                self._spike, self._has_updated = Spike(number, number), False
                self._report(step.state, jump)
            self._has_updated |= judged.has_updated
            self._spike = Spike(self._spike.first, number)
        else:
            self._settled += 1
        assert self._spike is not None
        is_over = self._settled == SETTLED
        if is_over or number - self._spike.first + 1 >= self._keys.loss_spike_patience:
            if is_over and not self._has_updated:
                log.info("the updates of the loss spike of step %d were skipped: the run goes on", self._spike.first)
                self._end(new_level=False)
            elif self._rewinds(step.state):
                self.asked = self._spike
            else:
                self._end(new_level=not is_over)

    def _rewinds(self, state: TrainState) -> bool:
        return self._keys.on_loss_spike == "rewind" and len(state.skipped_samples) < self._keys.max_rewinds

    def _end(self, new_level: bool) -> None:
        self._spike, self._settled = None, 0
        if new_level:
            self._detector.forget()

    def _report(self, state: TrainState, jump: Jump) -> None:
        self._files += 1
        samples = self._keep_batch(state) if self._files <= MOST_FILES else ""
        text = (
            f"loss spike at step {state.step}: {jump.loss:.4g} is {jump.distance:.1f} deviations above "
            f"{jump.median:.4g}, the median of the last {self._keys.loss_spike_window} losses (a deviation, 1.4826 "
            f"times their median distance from it, is {jump.deviation:.3g}; loss_spike_threshold is "
            f"{self._keys.loss_spike_threshold:g})"
        )
        text += f"; the step had {samples}" if samples else ""
        if self._keys.on_loss_spike == "rewind" and not self._rewinds(state):
            text += f"; the run does not go back, as it has done so {len(state.skipped_samples)} times (max_rewinds)"
        figures = {"loss": jump.loss, "median": jump.median, "deviation": jump.deviation}
        report(self._events, "spike", text, state.step, **figures)


class _Judged:
    """A step whose loss is judged while the next one is under way."""

    def __init__(self, step: FinishedStep) -> None:
        self.step, output = step, step.output
        self.loss, self._norm = DeferredScalar(output.loss), DeferredScalar(output.norm)
        self._limit = None if output.norm_limit is None else DeferredScalar(output.norm_limit)

    @property
    def has_updated(self) -> bool:
        """Whether the step has changed the weights: neither was its norm infinite, nor did `skip_update` skip it."""
        norm = self._norm.read()
        return math.isfinite(norm) and (self._limit is None or norm <= self._limit.read())


def spikes(run: Run) -> LossSpikes | None:
    """Registry entry: unless `on_loss_spike` is ignore."""
    keys, size = run.config.recovery, run.plan.batch.global_size
    if keys.on_loss_spike == "ignore":
        return None

    def keep_batch(state: TrainState) -> str:
        numbers = range(state.consumed_samples - size, state.consumed_samples)
        # A run that goes back comes to a step with other samples again.
        return keep_texts(run, f"loss_spike_step_{state.step}_sample_{numbers[0]}.jsonl", numbers)

    return LossSpikes(keys, run.events, keep_batch)
