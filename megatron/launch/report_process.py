"""The report of a run (`megatron/report/`), written by another process. Imports no torch."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import megatron

PATIENCE = 60.0  # seconds that the end of a run waits for its last report
POLL_SECONDS = 0.05


class ReportProcess:
    """Writes report.html, report.md and report.csv in a log folder. What cannot be written is warned of, once."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        """folder: the log folder. warn: takes one line."""
        self._folder, self._warn = folder, warn
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def is_running(self) -> bool:
        """Whether a process is at work. Of one that has failed is warned."""
        if self._process is None or self._process.poll() is None:
            return self._process is not None
        code, said = self._process.returncode, self._reaped()
        if code:
            self._warn(f"the report could not be written: {said[-1] if said else f'exit code {code}'}")
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

    def start(self, *flags: str) -> None:
        """Start the process, unless the last one is still running. flags: of tools/report.py."""
        if self.is_running():
            return
        root = str(Path(megatron.__file__).parent.parent)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        output = str(self._folder / "report.html")
        module = ["-P", "-m", "megatron.report.command"]  # -P: not another megatron in the working folder
        said = None
        try:
            said = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
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
            if said is not None:
                said.close()
            self._warn(f"the report could not be written: {error.strerror}")

    def end(self) -> None:
        """End a process that knows less than the one that will be started next."""
        if self.is_running():
            assert self._process is not None
            self._process.terminate()
            self._reaped()

    def wait(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until the report is written or `given_up` returns True, and `PATIENCE` at most."""
        deadline = time.monotonic() + PATIENCE
        while self.is_running() and not given_up():
            if time.monotonic() > deadline:
                self._warn(f"the report takes longer than {PATIENCE:.0f} s, and is written while the run ends")
                return
            time.sleep(POLL_SECONDS)
