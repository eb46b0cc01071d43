"""Go back from a loss spike: to the checkpoint before it, past the samples that led into it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import checkpoint_before, load_checkpoint
from megatron.hugging_face.published import base_of_adapters
from megatron.training.hooks.base import Hook, MicroBatches, Run
from megatron.training.hooks.spikes import LossSpikes
from megatron.training.reporting import report
from megatron.training.sample_texts import keep_texts
from megatron.training.stopping import Spike

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewinding:
    """Takes a run back without starting its processes again.

    What follows is what a run resumed from the checkpoint does: the step, the learning rate of each step, the metrics
    (what was recorded of later steps is set aside) and random numbers are those of the checkpoint's step. Only the
    samples are others.
    """

    run: Run
    hooks: Sequence[Hook]
    read_batches: Callable[[TrainState], Iterator[MicroBatches]]

    @property
    def asked(self) -> Spike | None:
        """The spike from which this rank asks to go back."""
        return next((hook.asked for hook in self.hooks if isinstance(hook, LossSpikes)), None)

    def go_back(self, spike: Spike, state: TrainState) -> TrainState | None:
        """Load the newest whole checkpoint from before `spike`. Collective over all ranks.

        state: where the run is. Returns where it goes on, with the samples from there to the end of the spike left out;
        None if there is no such checkpoint, and the run goes on as it is.
        """
        run, keys = self.run, self.run.config.checkpoint
        with run.clock.paused():
            run.liveness.begin("rewinding")
            for hook in self.hooks:
                hook.before_rewind()
            # Without the optimizer's state in what it began with, it can go back to its own checkpoints only.
            first = run.first_step + 1 if keys.no_load_optim else 0
            steps = range(first, spike.first)
            patience = run.config.recovery.loss_spike_patience
            checkpoint = checkpoint_before(Path(keys.save or ""), steps, state, patience, keys.verify)
            if checkpoint is None:
                self._stay(spike, state)
                return None
            loaded = load_checkpoint(run.engine, checkpoint, base=base_of_adapters(run.config))
            size = run.plan.batch.global_size
            begin, end = (state.consumed_samples - size * (state.step - step) for step in (spike.first - 1, spike.last))
            back = loaded.leaving_out(end, state.skipped_samples)
            left_out = range(loaded.consumed_samples, back.consumed_samples)
            self._report(spike, state, back, checkpoint, range(begin, end), left_out)
            for hook in self.hooks:
                hook.rewound(back)
        return back

    def _report(
        self,
        spike: Spike,
        state: TrainState,
        back: TrainState,
        checkpoint: Path,
        of_spike: Sequence[int],
        left_out: Sequence[int],
    ) -> None:
        kept = keep_texts(self.run, f"rewind_from_step_{state.step}_sample_{of_spike[0]}.jsonl", of_spike)
        text = (
            f"went back from step {state.step} to {checkpoint}, because of the loss spike of steps {spike.first} to "
            f"{spike.last}, which had {kept}; samples {left_out[0]:,} to {left_out[-1]:,} are left out (rewind "
            f"{len(back.skipped_samples)} of at most {self.run.config.recovery.max_rewinds})"
        )
        report(
            self.run.events,
            "rewind",
            text,
            state.step,
            to_step=back.step,
            spike=[spike.first, spike.last],
            samples_of_spike=[of_spike[0], of_spike[-1]],
            skipped_samples=[left_out[0], left_out[-1] + 1],
            checkpoint=str(checkpoint),
        )

    def _stay(self, spike: Spike, state: TrainState) -> None:
        log.info(  # rank 0 alone prints it
            "there is no whole checkpoint from before step %d in %s to go back to: the run goes on as it is",
            spike.first,
            self.run.config.checkpoint.save,
        )
        for hook in self.hooks:
            if isinstance(hook, LossSpikes):
                hook.give_up()
