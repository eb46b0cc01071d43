"""Find exact duplicates by a 128-bit hash of each text. The hashes are stored next to the output during a run.

They take about 90 bytes of memory per text. No torch.
"""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

HASH_BYTES = 16


def text_hash(text: str) -> bytes:
    """The 128-bit hash of a text."""
    return blake2b(text.encode(), digest_size=HASH_BYTES).digest()


class Duplicates:
    """The texts seen so far. resume_at: their number at the checkpoint of an interrupted run."""

    def __init__(self, path: str, resume_at: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = (resume_at or 0) * HASH_BYTES
        self._file = self.path.open("w+b" if resume_at is None else "r+b")
        kept = self._file.read(size)
        self._file.truncate(size)
        self._seen = {kept[start : start + HASH_BYTES] for start in range(0, size, HASH_BYTES)}

    def first_ones(self, hashes: Sequence[bytes]) -> npt.NDArray[np.bool_]:
        """Which of these texts are new; they are added."""
        first = np.zeros(len(hashes), bool)
        for number, value in enumerate(hashes):
            if value not in self._seen:
                self._seen.add(value)
                self._file.write(value)
                first[number] = True
        return first

    def checkpoint(self) -> int:
        """Flush the hashes to disk. Returns their number, for `resume_at`."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return len(self._seen)

    def close(self, keep: bool) -> None:
        """Close the file, and delete it unless `keep`."""
        self._file.close()
        if not keep:
            self.path.unlink(missing_ok=True)
