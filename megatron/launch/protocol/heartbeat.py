"""A rank's heartbeat: step and phase in a memory-mapped file, so that a beat costs no system call.

The rank writes, the agent of the same node reads. Standard library only.
"""

import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path

RUN_FOLDER = "DEEPY_RUN_FOLDER"
# The signal on which a rank writes the stacks of its threads.
STACKS = signal.SIGUSR2
# The phase in which rank 0 waits for a person: it takes each Ctrl-C itself, and may wait for as long as it likes.
CONVERSING = "conversing"
# What an agent reports of a rank that has no heartbeat yet, because it imports modules and opens files. Only of
# scripts in which every rank has one soon.
NOT_BEGUN = "before the start"
SCRIPTS_WITH_HEARTBEATS = ("train.py", "node_check.py")
_LAYOUT = struct.Struct("<qdd32s")  # step, monotonic time of the beat, median step in seconds (0: none yet), phase


@dataclass(frozen=True)
class RankStatus:
    """The last beat of a rank, as the agent of its node read it."""

    rank: int
    step: int  # the current one, from 1; 0 before the first
    phase: str
    age: float  # seconds since the beat
    median: float | None  # seconds per step, over the last steps; None before the second step


class Heartbeat:
    """The writing side. Without a folder (the rank was not started by deepy.py) it does nothing."""

    def __init__(self, rank: int, folder: Path | None) -> None:
        """Start to beat in `folder`. From then on the agent sends stop signals, which the rank must handle."""
        self._memory: mmap.mmap | None = None
        if folder is not None:
            path, partial = folder / f"heartbeat_{rank}", folder / f"heartbeat_{rank}.partial"
            partial.write_bytes(bytes(_LAYOUT.size))
            with partial.open("r+b") as file:
                self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)
            self.beat("starting", 0)
            partial.replace(path)

    @classmethod
    def of_this_process(cls) -> "Heartbeat":
        """The heartbeat of this process, whose rank and run folder are in the environment."""
        folder = os.environ.get(RUN_FOLDER)
        return cls(int(os.environ.get("RANK", "0")), Path(folder) if folder else None)

    def beat(self, phase: str, step: int, median: float | None = None) -> None:
        """Record that a phase (at most 32 bytes) of a step begins. median: seconds per step."""
        if self._memory is not None:
            _LAYOUT.pack_into(self._memory, 0, step, time.monotonic(), median or 0.0, phase.encode())


def read_rank_status(folder: Path, rank: int) -> RankStatus | None:
    """The last beat of a rank of this machine, or None before the first."""
    try:
        content = (folder / f"heartbeat_{rank}").read_bytes()
        step, beaten, median, phase = _LAYOUT.unpack(content)
    except (OSError, struct.error):
        return None
    age = max(0.0, time.monotonic() - beaten)
    return RankStatus(rank, step, phase.rstrip(b"\0").decode(errors="replace"), age, median or None)
