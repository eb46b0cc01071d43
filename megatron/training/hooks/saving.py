"""Hook: save checkpoints when they are due and at the end of the run."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.checkpoint.folder import Retention, best_checkpoint, read_document
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter
from megatron.config.schema.run_keys import CheckpointKeys
from megatron.events import EventLog
from megatron.training.clock import Clock
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run
from megatron.training.identity import identity_of
from megatron.training.liveness import Liveness

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveSteps:
    """Steps to save after: every `factor` steps or, if `logarithmic`, the powers of `factor`; and the `extra` ones."""

    factor: int | None = None
    logarithmic: bool = False
    extra: frozenset[int] = frozenset()

    @classmethod
    def of(cls, keys: CheckpointKeys) -> "SaveSteps":
        """As the configuration says."""
        return cls(keys.checkpoint_factor, keys.checkpoint_scale == "log", frozenset(keys.extra_save_iters))

    def __contains__(self, step: int) -> bool:
        if step in self.extra or self.factor is None:
            return step in self.extra
        if not self.logarithmic:
            return step % self.factor == 0
        power = 1
        while power < step and self.factor > 1:
            power *= self.factor
        return power == step


class Saving(Hook):
    """Passes the state of the training to the checkpoint writer when a checkpoint is due."""

    def __init__(
        self,
        writer: CheckpointWriter,
        steps: SaveSteps,
        clock: Clock,
        liveness: Liveness | None = None,
        best_loss: float | None = None,
        events: EventLog | None = None,
    ) -> None:
        """best_loss: save after each validation with a lower loss; None: the best is not kept."""
        self._writer, self._steps, self._clock, self._liveness = writer, steps, clock, liveness or Liveness()
        self._best_loss, self._events = best_loss, events or EventLog()

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Save if due. Collective over all ranks. Raises RunError if the checkpoint cannot be written."""
        loss = step.metrics.get("validation/lm_loss")
        is_best = False
        if self._best_loss is not None and loss is not None:
            self._writer.finish()  # its thread and this one must not use the process group at once
            is_best = self._writer.agree(loss < self._best_loss)
            self._best_loss = loss if is_best else self._best_loss
        if is_best or step.is_last or step.state.step in self._steps:
            self._save(step.state, loss, is_best)
        return NOTHING

    def _save(self, state: TrainState, loss: float | None, is_best: bool) -> None:
        with self._clock.paused():
            self._liveness.begin("saving")
            started = time.perf_counter()
            self._writer.save(state, loss, is_best)
        done = "copied, and is written in the background," if self._writer.asynchronous else "saved"
        best = " (the best so far)" if is_best else ""
        text = f"step {state.step} {done} in {time.perf_counter() - started:.1f} s{best}"
        log.info("%s", text)
        self._events.record("checkpoint", text, state.step)

    def before_rewind(self) -> None:
        """Wait until everything is on disk."""
        self._writer.finish()

    def rewound(self, state: TrainState) -> None:
        """Store which samples are left out, so that a run that resumes from this checkpoint knows."""
        self._liveness.begin("saving")
        self._writer.save_again(state)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._writer.finish()


def saving(run: Run) -> Saving | None:
    """Registry entry: with `save`."""
    keys = run.config.checkpoint
    if keys.save is None:
        return None
    folder = Path(keys.save)
    retention = Retention(keys.keep_last_n_checkpoints, frozenset(keys.extra_save_iters), keys.keep_best_checkpoint)
    config = run.config.to_flat(with_defaults=True)
    identity = identity_of(run.tokenizer, run.config.data)
    writer = CheckpointWriter(run.engine, folder, config, retention, keys.async_save, identity)
    if run.first_step == 0 and 0 in keys.extra_save_iters:
        writer.save(TrainState())
    best_loss = best_loss_in(folder) if keys.keep_best_checkpoint else None
    return Saving(writer, SaveSteps.of(keys), run.clock, run.liveness, best_loss, run.events)


def best_loss_in(folder: Path) -> float:
    """The validation loss of the checkpoint that `best` names; infinite without one."""
    best = best_checkpoint(folder)
    loss = read_document(best / "progress.json").get("validation_loss") if best else None
    return float(loss) if isinstance(loss, int | float) else float("inf")
