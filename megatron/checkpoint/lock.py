"""One writer to a folder of checkpoints: two runs in the same one would delete and overwrite each other's."""

import os
from pathlib import Path
from typing import Self

from megatron.files import FileLock

LOCK = ".lock"


class SaveLock:
    """The right to write into a folder. A context manager: the right ends with the block."""

    def __init__(self, folder: Path | None) -> None:
        """folder: None for a process that writes nothing."""
        self._folder = folder
        self._lock = None if folder is None else FileLock(folder / LOCK, f"save ({folder})")

    def take(self) -> None:
        """Take the lock, unless it is taken already; nothing to do yet while the folder is not there.

        Raises UserError, naming the process that holds it.
        """
        if self._folder is not None and self._lock is not None and os.access(self._folder, os.W_OK):
            self._lock.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
