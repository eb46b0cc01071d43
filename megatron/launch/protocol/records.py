"""Status files of a run: ranks write them for the agent of their node, agents for deepy.py.

Each file has one writer and is replaced atomically, so a reader never sees half of it. Ranks write into a folder of
their machine, agents into one that all machines share. Standard library only.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron.launch.protocol.heartbeat import RankStatus

# How a rank ended: by an uncaught exception, or with an exit code after a message on stderr.
End = Literal["exception", "exit"]


@dataclass(frozen=True)
class RankRecord:
    """The state of one rank, written by itself; `code` is None while it runs."""

    rank: int
    process: int
    code: int | None = None
    ended_at: float = 0.0  # seconds since 1970; clocks of machines agree well enough to order failures
    end: End = "exit"
    text: str = ""  # the traceback, or the last lines of the rank's stderr

    @property
    def failed(self) -> bool:
        """Whether it ended with a code other than 0."""
        return self.code not in (None, 0)

    def ended(self, code: int, end: End, text: str) -> "RankRecord":
        """The same rank, ended now."""
        return RankRecord(self.rank, self.process, code, time.time(), end, text)


@dataclass(frozen=True)
class RankStacks:
    """The stacks of a rank. text: as faulthandler writes them; state: the letter in /proc, "T" for stopped."""

    rank: int
    state: str
    text: str


@dataclass(frozen=True)
class NodeRecord:
    """The state of one node, written by its agent."""

    node: int
    host: str  # as the hostfile or the launcher names it
    machine: str = ""  # as it calls itself
    beat: int = 0  # increases at least once a second while the agent lives
    port: int = 0  # of rank 0, chosen by node 0
    ranks: tuple[RankRecord, ...] = ()
    gone: tuple[RankRecord, ...] = ()  # ended without a record of it; `code` as far as the kernel knows it
    killed_for_memory: bool = False  # the kernel killed processes here because memory was exhausted
    last_lines: dict[str, str] = field(default_factory=dict)  # of the logs of the ranks in `gone`, by rank
    statuses: tuple[RankStatus, ...] = ()  # of the ranks that run
    steps: dict[str, int] = field(default_factory=dict)  # that ranks have begun, also those that have ended, by rank
    stacks_round: int = 0  # the request (Orders.stacks) that `stacks` answers
    stacks: tuple[RankStacks, ...] = ()
    problem: str = ""  # why the agent could not start its ranks
    code: int | None = None  # of DeepSpeed's launcher, after it has ended

    @property
    def rank_numbers(self) -> set[int]:
        """Its ranks as far as they are known: one that has not begun has a status, but no record."""
        return {one.rank for one in self.ranks} | {one.rank for one in self.statuses}


def write_rank(folder: Path, record: RankRecord) -> None:
    """Write a rank's record, replacing its earlier one."""
    write_json(folder / f"rank_{record.rank}.json", asdict(record))


def read_ranks(folder: Path) -> list[RankRecord]:
    """The records of all ranks that have started on this node, in the order of ranks."""
    records = [RankRecord(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank_*.json")]
    return sorted(records, key=lambda record: record.rank)


def write_node(folder: Path, record: NodeRecord) -> None:
    """Write a node's record, replacing its earlier one."""
    write_json(folder / f"node_{record.node}.json", asdict(record))


def read_node(folder: Path, node: int) -> NodeRecord | None:
    """A node's record, or None before it has written one."""
    try:
        fields = json.loads((folder / f"node_{node}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet, or just being replaced on a slow file system
        return None
    fields["ranks"] = tuple(RankRecord(**rank) for rank in fields["ranks"])
    fields["gone"] = tuple(RankRecord(**rank) for rank in fields["gone"])
    fields["statuses"] = tuple(RankStatus(**status) for status in fields["statuses"])
    fields["stacks"] = tuple(RankStacks(**stacks) for stacks in fields["stacks"])
    return NodeRecord(**fields)


def write_json(path: Path, content: Any) -> None:
    """Write a file that only its owner may read, and put it in place atomically."""
    partial = path.with_suffix(".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)
    partial.replace(path)


def look_at_ranks(folder: Path) -> tuple[list[RankRecord], list[RankRecord]]:
    """The records of all ranks of this machine, and those of the vanished ones.

    They have ended without a record of it: by a signal, or past Python (`os._exit`). `code` is then the kernel's: minus
    the number of a signal, or an exit code; None if it is no longer known.
    """
    records = read_ranks(folder)
    fates = {one.rank: fate for one in records if one.code is None and (fate := _fate(one.process)) is not None}
    if not fates:
        return records, []
    records = read_ranks(folder)  # one that ended between the two looks has left its record
    silent = [one for one in records if one.code is None and one.rank in fates]
    return records, [replace(one, code=fates[one.rank].code) for one in silent]


def process_state(process: int) -> str:
    """The state letter in /proc of a process ("T": stopped), "?" if it has none."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


@dataclass(frozen=True)
class _Fate:
    code: int | None


def _fate(process: int) -> _Fate | None:
    """How a process ended; None while it runs. The kernel keeps the code until the parent has waited for it."""
    try:
        os.kill(process, 0)
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except ProcessLookupError:
        return _Fate(None)
    except OSError:  # no /proc here
        return None
    return _Fate(os.waitstatus_to_exitcode(int(fields[-1]))) if fields[0] in "ZX" else None
