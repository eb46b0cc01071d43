"""Read metrics.jsonl, also one of a million lines, one that is still being written, and one with damaged lines."""

import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Steps = NDArray[np.int64]

_AT_ONCE = 20_000  # rows that are kept as Python objects before they become an array


@dataclass(frozen=True)
class Series:
    """One metric. steps: ascending [n]; values: [n], NaN where it was not finite."""

    steps: Steps
    values: Numbers


@dataclass
class _Rows:
    """Rows with the same names: columns are the number of the line, the step, and one value per name."""

    waiting: list[tuple[Any, ...]] = field(default_factory=list)
    arrays: list[Numbers] = field(default_factory=list)

    def settled(self) -> Numbers:
        """All rows as one array [rows, 2 + names]."""
        if self.waiting:
            self.arrays = [np.concatenate([*self.arrays, _as_numbers(self.waiting)])]
            self.waiting = []
        elif len(self.arrays) > 1:
            self.arrays = [np.concatenate(self.arrays)]
        return self.arrays[0]


class MetricsFile:
    """The rows of a metrics file. `update` reads only what is new, so a growing file can be followed."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._rows: dict[tuple[str, ...], _Rows] = defaultdict(_Rows)
        self._offset = 0
        self._last = b""  # line that was read
        self._lines = 0
        self._identity: object = None
        self.damaged = 0  # lines that are no row of metrics
        self.is_cut = False  # whether the last line has no end yet

    def update(self) -> None:
        """Read the lines that have been added; all of them, if the file was replaced. Raises OSError."""
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            # The number of a file that was removed soon belongs to another one, so that its content counts too.
            identity = status.st_dev, status.st_ino
            file.seek(max(0, self._offset - len(self._last)))
            if identity != self._identity or file.read(len(self._last)) != self._last:
                self._forget()
                self._identity = identity
                file.seek(0)
            self.is_cut = False
            for line in file:
                if not line.endswith(b"\n"):
                    self.is_cut = True
                    break
                self._offset += len(line)
                self._last = line
                self._add(line)

    def _add(self, line: bytes) -> None:
        row = _parsed(line)
        step = row.pop("step", None) if isinstance(row, dict) else None
        if not isinstance(row, dict) or type(step) is not int or not 0 <= step < 1 << 53:
            self.damaged += bool(line.strip())
            return
        rows = self._rows[tuple(row)]
        rows.waiting.append((self._lines, step, *row.values()))
        self._lines += 1
        if len(rows.waiting) == _AT_ONCE:
            rows.arrays.append(_as_numbers(rows.waiting))
            rows.waiting = []

    def __len__(self) -> int:
        """The number of rows read."""
        return self._lines

    def split(self) -> tuple[Steps, dict[str, Series], dict[str, Series]]:
        """The steps of the rows that count [n], their metrics by name, and those of rows that do not count.

        A row does not count if a later one is of an earlier step: the run went back, and trained those steps again.
        """
        line_steps = np.empty(self._lines, dtype=np.int64)
        for rows in self._rows.values():
            settled = rows.settled()
            line_steps[settled[:, 0].astype(np.int64)] = settled[:, 1].astype(np.int64)
        following = np.minimum.accumulate(line_steps[::-1])[::-1]  # the smallest step from this line on
        counts = np.ones(self._lines, dtype=bool)
        counts[:-1] = following[1:] >= line_steps[:-1]
        parts: dict[str, list[tuple[NDArray[np.int64], Numbers]]] = defaultdict(list)
        for names, rows in self._rows.items():
            settled = rows.settled()
            lines = settled[:, 0].astype(np.int64)
            for column, name in enumerate(names, 2):
                parts[name].append((lines, settled[:, column]))
        valid: dict[str, Series] = {}
        gone: dict[str, Series] = {}
        for name, pieces in parts.items():
            lines = np.concatenate([piece[0] for piece in pieces])
            values = np.concatenate([piece[1] for piece in pieces])
            order = np.argsort(lines, kind="stable")
            lines, values = lines[order], values[order]
            values = np.where(np.isfinite(values), values, np.nan)
            kept = counts[lines]
            if kept.any():
                valid[name] = _last_of_each_step(line_steps[lines[kept]], values[kept])
            if not kept.all():
                gone[name] = Series(line_steps[lines[~kept]], values[~kept])
        return np.unique(line_steps[counts]), valid, gone


def _last_of_each_step(steps: Steps, values: Numbers) -> Series:
    """`steps` ascend, but may repeat: the last row of a step counts."""
    last = np.append(steps[1:] != steps[:-1], True)
    return Series(steps[last], values[last])


def _parsed(line: bytes) -> Any:
    """The value of a line of JSON, None if it is none. NaN and Infinity, which other programs write, are numbers."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _as_numbers(rows: list[tuple[Any, ...]]) -> Numbers:
    """Rows of numbers as an array; whatever is no number becomes NaN."""
    try:
        return np.array(rows, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        numbers = [[_as_number(value) for value in row] for row in rows]
        return np.array(numbers, dtype=np.float64)


def _as_number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else float("nan")
    except OverflowError:
        return float("nan")
