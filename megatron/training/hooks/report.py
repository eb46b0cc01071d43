"""Hook: the report of the run (`megatron/report/`), at each checkpoint and at the end, written by another process."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch.distributed as dist

import megatron
from megatron.events import Event
from megatron.training.hooks.base import NOTHING, FinishedStep, Hook, Run

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that the end of a run waits for its last report


class ReportWriter(Hook):
    """Starts a process of the lowest priority, which reads the log folder; no step waits for it.

    A report that cannot be written is warned of, and the run goes on.
    """

    def __init__(self, folder: Path) -> None:
        """folder: the log folder, in which report.html, report.md and report.csv are written."""
        self._folder = folder
        self._due: int | None = None  # the step of a checkpoint that no report has
        self._is_done = False
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def told(self, event: Event) -> None:
        """After a checkpoint the report is due."""
        if event.kind == "checkpoint":
            self._due = event.step

    def after_step(self, step: FinishedStep) -> Mapping[str, float]:
        """Start what an earlier step has made due: only now are its metrics in their file."""
        is_due = self._due is not None and self._due < step.state.step and not step.is_last
        if not self._runs() and is_due:
            self._due = None
            self._start("--background")
        self._is_done = step.is_last and not step.is_stop
        return NOTHING

    def _runs(self) -> bool:
        """Whether a process is at work. Of one that has failed is warned, once."""
        if self._process is None or self._process.poll() is None:
            return self._process is not None
        code, said = self._process.returncode, self._reaped()
        if code:
            log.warning("the report could not be written: %s", said[-1] if said else f"exit code {code}")
        return False

    def _reaped(self) -> list[str]:
        """Forget the process when it has ended; the lines that it has printed on stderr."""
        assert self._process is not None and self._said is not None
        self._process.wait()
        with self._said:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").split("\n")
        self._process = self._said = None
        return [line for line in lines if line.strip()]

    def _start(self, *flags: str) -> None:
        root = str(Path(megatron.__file__).parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        output = str(self._folder / "report.html")
        module = ["-P", "-m", "megatron.report.command"]  # -P: not another megatron in the working folder
        said = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
        try:
            self._process = subprocess.Popen(
                [sys.executable, *module, str(self._folder), "-o", output, *flags],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,  # Ctrl-C, and the launcher's end of a rank that failed, leave it alone
            )
            self._said = said
        except OSError as error:
            said.close()
            log.warning("the report could not be written: %s", error.strerror)

    def close(self) -> None:
        """Write the last report, with the metrics of the last step. A run that failed or is stopped does not wait."""
        if self._runs():
            assert self._process is not None
            self._process.terminate()  # it knows less than the last report, and gives way to everything
            self._reaped()
        self._start()
        if self._process is None or not self._is_done:
            return
        try:
            self._process.wait(PATIENCE)
            self._runs()
        except subprocess.TimeoutExpired:
            log.warning("the report takes longer than %.0f s, and is written while the run ends", PATIENCE)


def report(run: Run) -> ReportWriter | None:
    """Registry entry: on rank 0, if the run writes files, unless `report` is false."""
    if run.config.log_folder is None or not run.config.logging.report or dist.get_rank() != 0:
        return None
    hook = ReportWriter(Path(run.config.log_folder))
    run.events.listen(hook.told)
    return hook
