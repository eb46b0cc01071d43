"""A rank's heartbeat: step and phase in a small file in memory, which costs the rank no system call.

Standard library only. The rank writes through a memory map; the agent of its node, on the same machine, reads.
"""

import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path

RUN_FOLDER = "DEEPY_RUN_FOLDER"
# What every rank understands as "write down what you are doing".
STACKS = signal.SIGUSR2
_LAYOUT = struct.Struct("<qdd32s")  # step, monotonic time of the last beat, median step in seconds (0: none yet), phase


@dataclass(frozen=True)
class RankStatus:
    """A rank's last sign of life, as its node read it."""

    rank: int
    step: int  # the one it is in, counted from 1; 0 before the first
    phase: str
    age: float  # seconds since then
    median: float | None  # seconds per step, over the last steps


class Heartbeat:
    """The writing side. Without a folder (a rank that deepy.py did not start) it does nothing."""

    def __init__(self, rank: int, folder: Path | None) -> None:
        """Begin to beat in `folder`, which promises that this rank ends at a step boundary when a signal asks."""
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
        """The heartbeat of the rank that the environment says this process is."""
        folder = os.environ.get(RUN_FOLDER)
        return cls(int(os.environ.get("RANK", "0")), Path(folder) if folder else None)

    def beat(self, phase: str, step: int, median: float | None = None) -> None:
        """Say what this rank begins to do now. phase: at most 32 letters."""
        if self._memory is not None:
            _LAYOUT.pack_into(self._memory, 0, step, time.monotonic(), median or 0.0, phase.encode())


def read_rank_status(folder: Path, rank: int) -> RankStatus | None:
    """The last beat of a rank of this machine, or None if it does not beat (yet)."""
    try:
        content = (folder / f"heartbeat_{rank}").read_bytes()
        step, beaten, median, phase = _LAYOUT.unpack(content)
    except (OSError, struct.error):
        return None
    age = max(0.0, time.monotonic() - beaten)
    return RankStatus(rank, step, phase.rstrip(b"\0").decode(errors="replace"), age, median or None)
