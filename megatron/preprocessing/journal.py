"""What a run has brought to the disk for certain, line by line, so that another can go on from there.

The first line says which work it is; each further one is a checkpoint. A last line that is not complete is none.
No torch.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.errors import UserError


@dataclass
class Checkpoint:
    """How far the work is: input number `span` up to `offset` and `line` of its content.

    outputs: by key the bytes and documents written. hashes: by key the texts known to `Duplicates`. totals: as counted.
    digests: of the inputs that are done. first_seen: code points handed to a fast backend for the first time since the
    checkpoint before. complete: nothing is left to be read.
    """

    span: int = 0
    offset: int = 0
    line: int = 0
    outputs: dict[str, tuple[int, int]] = field(default_factory=dict)
    hashes: dict[str, int] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)
    digests: list[str | None] = field(default_factory=list)
    first_seen: list[int] = field(default_factory=list)
    complete: bool = False


class Journal:
    """The checkpoints of one run. work: what decides about the output, as JSON."""

    def __init__(self, path: str, work: dict[str, Any]) -> None:
        self.path = Path(path)
        self.checkpoints: list[Checkpoint] = []
        self._work = work

    @property
    def last(self) -> Checkpoint | None:
        """The latest checkpoint."""
        return self.checkpoints[-1] if self.checkpoints else None

    def load(self) -> None:
        """Read what an interrupted run left, if it left anything. Raises UserError if that was other work."""
        if not self.path.exists():
            return
        lines = self.path.read_text("utf-8").split("\n")[:-1]
        found = json.loads(lines[0]) if lines else self._work
        different = [name for name in self._work if found.get(name) != self._work[name]]
        if different:
            raise UserError(
                f"{self.path} is of a run with other {', '.join(different)}, which cannot be continued with these; "
                "leave out --resume to start anew"
            )
        self.checkpoints = [Checkpoint(**json.loads(line)) for line in lines[1:]]

    def append(self, checkpoint: Checkpoint) -> None:
        """Note a checkpoint, for certain."""
        entries: list[Any] = [asdict(checkpoint)] if self.checkpoints else [self._work, asdict(checkpoint)]
        with self.path.open("ab" if self.checkpoints else "wb") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            file.flush()
            os.fsync(file.fileno())
        self.checkpoints.append(checkpoint)

    def roll_back(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Forget all checkpoints from the first before which a code point of `ranges` was seen.

        A range that begins with ASCII, which is not noted, forgets all.
        """
        kept: list[Checkpoint] = []
        for checkpoint in self.checkpoints:
            if any(
                start < 128 or any(start <= seen < stop for seen in checkpoint.first_seen) for start, stop in ranges
            ):
                break
            kept.append(checkpoint)
        self.clear()
        for checkpoint in kept:
            self.append(checkpoint)

    def clear(self) -> None:
        """Forget all."""
        self.path.unlink(missing_ok=True)
        self.checkpoints = []
