"""Writers to files on this machine: JSON Lines, CSV, TensorBoard."""

import csv
import io
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.files import replaced_when_complete
from megatron.metrics.writers import METRICS_FILE, MetricWriter, WriterSettings, user_errors

log = logging.getLogger(__name__)

CSV_FILE = "metrics.csv"
CSV_HEADER = b"step,name,value\n"


class _Lines(MetricWriter):
    """Appends the lines of a step to a file in one write, or none of them."""

    def __init__(self, path: Path, first_step: int, step_of: Callable[[bytes], int | None]) -> None:
        """Open `path` for appending; an earlier run's steps beyond `first_step` are moved to another file.

        step_of: the step of a line, or None for a line that does not belong there.
        """
        self._path, self._file, self._step_of = path, -1, step_of
        with user_errors(f"log_dir: {path} cannot be written", "logging", OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _set_later_steps_aside(path, first_step, step_of)
            self.open()

    def open(self) -> None:
        """Open the file, unless it is open."""
        if self._file < 0:
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def go_back(self, step: int) -> None:
        """Move later steps to another file."""
        self.close()
        _set_later_steps_aside(self._path, step, self._step_of)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            number, self._file = self._file, -1
            os.close(number)

    def append(self, lines: bytes) -> None:
        """Raises OSError if they do not fit on the disk, and takes back the part of them that did."""
        size = os.fstat(self._file).st_size
        if (written := os.write(self._file, lines)) < len(lines):
            os.ftruncate(self._file, size)
            raise OSError(f"{self._path}: only {written} of {len(lines)} bytes were written")


class JsonLines(_Lines):
    """One object per logged step: {"step": 11, "train/lm_loss": 3.2, ...}. NaN and infinity become null."""

    def __init__(self, path: Path, first_step: int) -> None:
        """As `_Lines`."""
        super().__init__(path, first_step, _step_of_object)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; the file is complete at any moment."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.append(json.dumps({"step": step} | finite).encode() + b"\n")


class Csv(_Lines):
    """One row per value: step, name, value. A column per name would not do, as names may come later."""

    def __init__(self, path: Path, first_step: int) -> None:
        """As `_Lines`."""
        super().__init__(path, first_step, _step_of_row)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row for each value, under a header."""
        rows = io.StringIO()
        csv.writer(rows, lineterminator="\n").writerows((step, name, value) for name, value in values.items())
        header = b"" if os.fstat(self._file).st_size else CSV_HEADER
        self.append(header + rows.getvalue().encode())


class Tensorboard(MetricWriter):
    """Event files for TensorBoard."""

    in_background = True  # flushing is slow where the folder is on a network

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open event files in `folder`; TensorBoard hides an earlier run's steps beyond `first_step`."""
        self._folder, self._purge_step = folder, first_step + 1
        self._writer: Any = None
        with user_errors(f"tensorboard_dir ({folder}) cannot be written", "logging", OSError):
            self.open()

    def open(self) -> None:
        """Start an event file, unless there is one."""
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add all values as one event, and flush it: a failure of the library's own thread shows here."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.file_writer.add_summary(Summary(value=scalars), step)
        self._writer.flush()
        self._purge_step = step + 1  # a file that is opened after a failure must hide nothing

    def go_back(self, step: int) -> None:
        """Start another event file, with which TensorBoard hides later steps."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()


def json_lines(settings: WriterSettings) -> JsonLines | None:
    """Registry entry: whenever the run writes files."""
    return JsonLines(settings.folder / METRICS_FILE, settings.first_step) if settings.folder else None


def csv_file(settings: WriterSettings) -> Csv | None:
    """Registry entry: with `use_csv`."""
    wanted = settings.logging.use_csv and settings.folder is not None
    return Csv(settings.folder / CSV_FILE, settings.first_step) if wanted and settings.folder else None


def tensorboard(settings: WriterSettings) -> Tensorboard | None:
    """Registry entry: with `tensorboard_dir`."""
    folder = settings.logging.tensorboard_dir
    return Tensorboard(Path(folder), settings.first_step) if folder else None


def _set_later_steps_aside(path: Path, first_step: int, step_of: Callable[[bytes], int | None]) -> None:
    """Move steps that will be trained again, and lines that are no metrics, from `path` to a file beside it."""
    if not path.is_file():  # a device or a pipe has no earlier steps
        return
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [step_of(line) for line in lines]
    kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= first_step]
    if len(kept) == len(lines):
        return
    moved = [line for line, step in zip(lines, steps, strict=True) if step is None or not 0 <= step <= first_step]
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    with replaced_when_complete(path, "wb") as file:
        file.write(b"".join(kept))
        file.flush()
        with replaced_when_complete(aside, "wb") as other:  # before `path` changes, so that a full disk loses nothing
            other.write(b"".join(moved))
    log.info("%s continues from step %d; what it had of later steps is in %s", path, first_step, aside.name)


def _step_of_object(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl; None for what a crash left of one, and for lines of other programs."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None


def _step_of_row(line: bytes) -> int | None:
    """The step of a row of metrics.csv; the header is before all steps."""
    if line == CSV_HEADER:
        return -1
    first = line.partition(b",")[0]
    return int(first) if first.isdigit() and line.count(b",") >= 2 and line.endswith(b"\n") else None
