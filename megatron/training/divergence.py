"""Hook: the end of a run that makes no progress any more, because its gradients stay no numbers. Floor 6."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.errors import RunError
from megatron.training.hooks import NOTHING, FinishedStep, Hook, Run

# A dynamic loss scale that starts far too high halves once in a few steps until it fits; that is no divergence.
PATIENCE = {"fp32": 10, "bf16": 10, "fp16": 100}


class Divergence(Hook):
    """Counts steps without an update. One bad batch is passed over; `patience` of them in a row end the run.

    The engine updates nothing from gradients that are no numbers, so the weights, and whatever was saved of them,
    are those from before.
    """

    def __init__(self, patience: int, write_batch: Callable[[TrainState], str] = lambda _: "") -> None:
        """patience: steps in a row that may be skipped. write_batch: keeps the batch of a step; returns where."""
        self._patience = patience
        self._write_batch = write_batch
        self._skipped = 0

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Raise RunError when there have been too many skipped steps in a row."""
        self._skipped = self._skipped + 1 if step.output.skipped else 0
        if self._skipped >= self._patience:
            raise RunError(
                f"the training has diverged: the gradients of the last {self._skipped} steps, up to step "
                f"{step.state.step}, were not finite (loss {float(step.output.loss)}). "
                f"A lower learning rate or a longer warm-up may help. {self._write_batch(step.state)}"
            )
        return NOTHING


def divergence(run: Run) -> Divergence:
    """Registry entry: in every run."""
    return Divergence(PATIENCE[run.plan.engine.precision], lambda state: keep_batch(run, state))


def keep_batch(run: Run, state: TrainState) -> str:
    """Write the samples of the step that led to `state`, as JSON lines with number and text, where logs are kept.

    Returns a sentence that says which they are and where to look. Rank 0 writes.
    """
    numbers = range(state.consumed_samples - run.plan.batch.global_size, state.consumed_samples)
    told = f"The last batch was samples {numbers[0]:,} to {numbers[-1]:,}"
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
