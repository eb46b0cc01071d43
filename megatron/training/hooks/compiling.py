"""Hook: announce that the first step compiles the model, and how long it took."""

import logging
import time
from collections.abc import Iterator, Mapping

from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, MicroBatches, Run
from megatron.units import duration

log = logging.getLogger(__name__)


class Compiling(Hook):
    """A line before the first step of this run, and one after it."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._is_done = False

    def watched(self, batches: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Log before the first batch is handed to the engine."""
        for batch in batches:
            if self._began is None:
                log.info("the first step compiles the model, which may take a minute")
                self._began = time.monotonic()
            yield batch

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Log after the first step."""
        if self._began is not None and not self._is_done:
            log.info("compiled: the first step took %s", duration(time.monotonic() - self._began))
            self._is_done = True
        return NOTHING


def compiling(run: Run) -> Compiling | None:
    """Registry entry: where blocks are compiled."""
    return Compiling() if run.plan.engine.compile else None
