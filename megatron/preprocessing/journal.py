"""The checkpoints of a preprocessing run, one JSON object per line, from which an interrupted run resumes.

The first line describes the work; each further line is a checkpoint. An incomplete last line is ignored. No torch.
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
    """The position of the work: input number `span` up to `offset` and `line` of its content.

    outputs: by key the bytes and documents written. hashes: by key the number of texts in `Duplicates`. totals: the
    counts so far. digests: of the completed inputs. first_seen: code points passed to a fast backend for the first time
    since the previous checkpoint. complete: all inputs are read.
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
    """The checkpoints of one run. work: everything that the output depends on, as JSON."""

    def __init__(self, path: str, work: dict[str, Any]) -> None:
        self.path = Path(path)
        self.checkpoints: list[Checkpoint] = []
        self._work = work

    @property
    def last(self) -> Checkpoint | None:
        """The latest checkpoint."""
        return self.checkpoints[-1] if self.checkpoints else None

    def load(self) -> None:
        """Read the checkpoints of an interrupted run, if any. Raises UserError if they are damaged or of other work."""
        if not self.path.exists():
            return
        try:
            lines = self.path.read_text("utf-8").split("\n")[:-1]
            found = json.loads(lines[0]) if lines else self._work
            checkpoints = [Checkpoint(**json.loads(line)) for line in lines[1:]]
            different = [name for name in self._work if found.get(name) != self._work[name]]
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} is damaged or of another version of Deepy, so its run cannot be resumed; "
                "leave out --resume to start anew"
            ) from error
        if different:
            raise UserError(
                f"{self.path} is of a run with other {', '.join(different)}, which cannot be resumed with these; "
                "leave out --resume to start anew"
            )
        self.checkpoints = checkpoints

    def append(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and flush it to disk."""
        entries: list[Any] = [asdict(checkpoint)] if self.checkpoints else [self._work, asdict(checkpoint)]
        with self.path.open("ab" if self.checkpoints else "wb") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            file.flush()
            os.fsync(file.fileno())
        self.checkpoints.append(checkpoint)

    def roll_back(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Remove all checkpoints from the first one that saw a code point of `ranges`.

        A range that begins with ASCII, which `first_seen` does not record, removes all.
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
        """Remove all checkpoints and the file."""
        self.path.unlink(missing_ok=True)
        self.checkpoints = []
