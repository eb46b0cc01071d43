"""What ranks leave in the run's folder for the launcher: who started, who ended how.

Floor 2, standard library only. One small file per rank, replaced as a whole, so that a reader never sees half of it.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

# How a rank ended: by an exception that nobody caught, or by an exit code after it had said why on stderr.
End = Literal["exception", "exit"]


@dataclass(frozen=True)
class RankRecord:
    """One rank as it tells about itself; `code` is None while it runs."""

    rank: int
    process: int
    code: int | None = None
    ended_at: float = 0.0  # seconds, the same clock on all ranks of a machine
    end: End = "exit"
    text: str = ""  # the traceback, or the end of what the rank wrote to stderr

    @property
    def failed(self) -> bool:
        """Whether it ended with a code other than 0."""
        return self.code not in (None, 0)

    def ended(self, code: int, end: End, text: str) -> "RankRecord":
        """The same rank, ended now."""
        return RankRecord(self.rank, self.process, code, time.monotonic(), end, text)


def write_record(folder: Path, record: RankRecord) -> None:
    """Put a rank's record in place of its older one."""
    path = folder / f"rank_{record.rank}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
    partial.replace(path)


def read_records(folder: Path) -> list[RankRecord]:
    """The records of all ranks that have started, in the order of ranks."""
    records = [RankRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank_*.json")]
    return sorted(records, key=lambda record: record.rank)


def first_failure(records: Sequence[RankRecord]) -> RankRecord | None:
    """The rank that failed first: the others usually fail because it is gone."""
    return min((record for record in records if record.failed), key=lambda record: record.ended_at, default=None)


def vanished(records: Sequence[RankRecord]) -> list[RankRecord]:
    """Ranks that are gone without having said so: a signal ended them, or an exit that Python knows nothing of.

    `code` is then what the system knows: a signal's number, negative, or an exit code; None if it has forgotten it.
    """
    silent = [(record, _fate(record.process)) for record in records if record.code is None]
    return [replace(record, code=fate.code) for record, fate in silent if fate is not None]


@dataclass(frozen=True)
class _Fate:
    code: int | None


def _fate(process: int) -> _Fate | None:
    """How a process ended; None while it runs. The system keeps the code until the parent has asked for it."""
    try:
        os.kill(process, 0)
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except ProcessLookupError:
        return _Fate(None)
    except OSError:  # no /proc here
        return None
    return _Fate(os.waitstatus_to_exitcode(int(fields[-1]))) if fields[0] in "ZX" else None
