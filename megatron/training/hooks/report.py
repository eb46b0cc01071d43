"""Hook: the report of the run (`megatron/report/`) after each checkpoint, written by another process.

The last report is written where the end of the run is recorded, so that it has the end: by deepy.py, or by `told_end`
in `run.py` without it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron.events import Event
from megatron.launch.report_process import ReportProcess
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run

log = logging.getLogger(__name__)


class ReportWriter(Hook):
    """Starts a process of the lowest priority, which reads the log folder; no step waits for it.

    A report that cannot be written is warned of, and the run goes on.
    """

    def __init__(self, folder: Path) -> None:
        """folder: the log folder, in which report.html, report.md and report.csv are written."""
        self.process = ReportProcess(folder, log.warning)
        self._due: int | None = None  # the step of a checkpoint that no report has

    def told(self, event: Event) -> None:
        """After a checkpoint the report is due."""
        if event.kind == "checkpoint":
            self._due = event.step

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Start what an earlier step has made due: only now are its metrics in their file."""
        is_due = self._due is not None and self._due < step.state.step and not step.is_last
        if not self.process.is_running() and is_due:
            self._due = None
            self.process.start("--background")
        return NOTHING

    def close(self) -> None:
        """Let the last report be the last to be written."""
        self.process.end()


def report(run: Run) -> ReportWriter | None:
    """Registry entry: on rank 0, if the run writes files, unless `report` is false."""
    if run.config.log_folder is None or not run.config.logging.report or dist.get_rank() != 0:
        return None
    hook = ReportWriter(Path(run.config.log_folder))
    run.events.listen(hook.told)
    return hook
