"""Hook: the end of a run that makes no progress any more, because its gradients stay no numbers."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.engine.late import LateNumber
from megatron.errors import RunError
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run

PATIENCE = 10
# Of fp16 besides: a dynamic scale that starts far too high halves once in a few steps until it fits.
PATIENCE_WHILE_THE_SCALE_FALLS = 100


class Divergence(Hook):
    """Counts steps without an update. One bad batch is passed over; too many of them in a row end the run.

    The engine updates nothing from gradients that are no numbers, so the weights, and whatever was saved of them,
    are those from before. A step is judged when the next one is under way, so that no device waits for it; the last
    one of a run at once.
    """

    def __init__(
        self,
        patience: int,
        write_batch: Callable[[TrainState], str] = lambda _: "",
        lowest_scale: float | None = None,
    ) -> None:
        """patience: steps in a row that may be skipped. write_batch: keeps the batch of a step; returns where.

        lowest_scale: of fp16; while the loss scale is above it, there is more patience.
        """
        self._patience = patience
        self._write_batch = write_batch
        self._lowest_scale = lowest_scale
        self._skipped = self._without_hope = 0
        self._before: tuple[FinishedStep, LateNumber] | None = None

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Raise RunError when there have been too many skipped steps in a row."""
        if self._before:
            self._judge(*self._before)
        self._before = step, LateNumber(step.output.norm)
        if step.is_last:
            self._judge(*self._before)
        return NOTHING

    def _judge(self, step: FinishedStep, norm: LateNumber) -> None:
        skipped = not math.isfinite(norm.read())
        scale, lowest = step.output.loss_scale, self._lowest_scale
        falls = scale is not None and lowest is not None and scale > lowest
        self._skipped = self._skipped + 1 if skipped else 0
        self._without_hope = self._without_hope + 1 if skipped and not falls else 0
        if self._without_hope >= self._patience or self._skipped >= PATIENCE_WHILE_THE_SCALE_FALLS:
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
    return Divergence(PATIENCE, lambda state: keep_batch(run, state), lowest)


def keep_batch(run: Run, state: TrainState) -> str:
    """Write the samples of the step that led to `state`, as JSON lines with number and text, where logs are kept.

    Returns a sentence that says which they are and where to look. Rank 0 writes.
    """
    numbers = range(state.consumed_samples - run.plan.batch.global_size, state.consumed_samples)
    told = f"The last batch of them was samples {numbers[0]:,} to {numbers[-1]:,}"
    if run.config.log_folder is None:
        return told
    path = Path(run.config.log_folder) / f"bad_batch_step_{state.step}.jsonl"
    if dist.get_rank() == 0:
        source = run.sources.samples("train")
        with path.open("w", encoding="utf-8") as file:
            for number in numbers:
                ids = np.atleast_2d(source[number])[0]  # the second row, where there is one, holds labels
                file.write(json.dumps({"sample": number, "text": run.tokenizer.decode(ids.tolist())}) + "\n")
    return f"{told}; their text is in {path}"
