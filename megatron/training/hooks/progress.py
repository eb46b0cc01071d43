"""Hook: a progress bar, on a terminal only."""

import logging
import sys
from collections.abc import Mapping
from contextlib import ExitStack

import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron.checkpoint.state import TrainState
from megatron.logging import PROJECT
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run


class ProgressBar(Hook):
    """A bar of the steps done; log lines scroll above it."""

    def __init__(self, first_step: int, last_step: int) -> None:
        """Draw the bar at `first_step` steps done."""
        self._open = ExitStack()
        self._open.enter_context(logging_redirect_tqdm([logging.getLogger(PROJECT)]))
        self._bar = self._open.enter_context(
            tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True, leave=False)
        )

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Advance by one step."""
        self._bar.update()
        return NOTHING

    def rewound(self, state: TrainState) -> None:
        """Go back to the step of `state`."""
        self._bar.n = state.step
        self._bar.refresh()

    def close(self) -> None:
        """Remove the bar."""
        self._open.close()


def progress(run: Run) -> ProgressBar | None:
    """Registry entry: on rank 0, if it writes to a terminal."""
    on_terminal = dist.get_rank() == 0 and sys.stdout.isatty() and sys.stderr.isatty()
    return ProgressBar(run.first_step, run.last_step) if on_terminal else None
