"""What a run's processes tell each other through files: ranks their node's agent, agents the launcher.

Standard library only. Each file has one writer and is replaced as a whole, so that a reader never sees half
of it. Ranks write into a folder of their machine; agents and the launcher into one that all machines share.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron.launch.protocol.heartbeat import RankStatus

# How a rank ended: by an exception that nobody caught, or by an exit code after it had said why on stderr.
End = Literal["exception", "exit"]


@dataclass(frozen=True)
class RankRecord:
    """One rank as it tells about itself; `code` is None while it runs."""

    rank: int
    process: int
    code: int | None = None
    ended_at: float = 0.0  # seconds since 1970: clocks of machines agree well enough to order failures
    end: End = "exit"
    text: str = ""  # the traceback, or the end of what the rank wrote to stderr

    @property
    def failed(self) -> bool:
        """Whether it ended with a code other than 0."""
        return self.code not in (None, 0)

    def ended(self, code: int, end: End, text: str) -> "RankRecord":
        """The same rank, ended now."""
        return RankRecord(self.rank, self.process, code, time.time(), end, text)


@dataclass(frozen=True)
class RankStacks:
    """What a rank was doing when it was asked. text: faulthandler's; state: the letter in /proc, "T" for stopped."""

    rank: int
    state: str
    text: str


@dataclass(frozen=True)
class NodeRecord:
    """One machine of the run as its agent sees it."""

    node: int
    host: str
    beat: int = 0  # counts up at least once a second while the agent lives
    port: int = 0  # chosen for the ranks' meeting, by node 0
    ranks: tuple[RankRecord, ...] = ()
    gone: tuple[RankRecord, ...] = ()  # ended without a word; `code` as far as the system knows it
    killed_for_memory: bool = False  # the system ended processes here because its memory was used up
    last_lines: dict[str, str] = field(default_factory=dict)  # of the logs of those who are gone, by rank
    statuses: tuple[RankStatus, ...] = ()
    stacks_round: int = 0  # of the launcher's requests for stacks, the one that `stacks` answers
    stacks: tuple[RankStacks, ...] = ()
    problem: str = ""  # why the agent could not start its ranks
    code: int | None = None  # of DeepSpeed's launcher, when it has ended


def write_rank(folder: Path, record: RankRecord) -> None:
    """Put a rank's record in place of its older one."""
    write_json(folder / f"rank_{record.rank}.json", asdict(record))


def read_ranks(folder: Path) -> list[RankRecord]:
    """The records of all ranks that have started here, in the order of ranks."""
    records = [RankRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank_*.json")]
    return sorted(records, key=lambda record: record.rank)


def write_node(folder: Path, record: NodeRecord) -> None:
    """Put a node's record in place of its older one."""
    write_json(folder / f"node_{record.node}.json", asdict(record))


def read_node(folder: Path, node: int) -> NodeRecord | None:
    """A node's record, or None before it has written one."""
    try:
        told = json.loads((folder / f"node_{node}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or just being replaced on a slow file system
        return None
    told["ranks"] = tuple(RankRecord(**rank) for rank in told["ranks"])
    told["gone"] = tuple(RankRecord(**rank) for rank in told["gone"])
    told["statuses"] = tuple(RankStatus(**status) for status in told["statuses"])
    told["stacks"] = tuple(RankStacks(**stacks) for stacks in told["stacks"])
    return NodeRecord(**told)


def write_json(path: Path, content: Any) -> None:
    """Write a file that only its owner may read, and put it in place at once."""
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)
    partial.replace(path)


def first_failure(records: Sequence[RankRecord]) -> RankRecord | None:
    """The rank that failed first: the others usually fail because it is gone."""
    return min((record for record in records if record.failed), key=lambda record: record.ended_at, default=None)


def vanished(records: Sequence[RankRecord]) -> list[RankRecord]:
    """Ranks of this machine that are gone without having said so: ended by a signal, or without Python's knowledge.

    `code` is then what the system knows: a signal's number, negative, or an exit code; None if it has forgotten it.
    """
    silent = [(record, _fate(record.process)) for record in records if record.code is None]
    return [replace(record, code=fate.code) for record, fate in silent if fate is not None]


def process_state(process: int) -> str:
    """The letter that /proc has for a process ("T": stopped), "?" where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


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
