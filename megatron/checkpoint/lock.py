"""Lock a folder of checkpoints, so that two runs do not delete and overwrite each other's."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Self

from megatron.files import FileLock

LOCK = ".lock"


class SaveLock:
    """The exclusive right to write to a folder. A context manager that releases it."""

    def __init__(self, folder: Path | None, abandoned: Collection[tuple[str, int]] = ()) -> None:
        """folder: None on ranks that write nothing. abandoned: processes from whom the lock is taken (`FileLock`)."""
        self._folder = folder
        self._lock = None if folder is None else FileLock(folder / LOCK, f"save ({folder})", abandoned=abandoned)

    def take(self) -> None:
        """Take the lock, unless this object has it already or the folder does not exist yet.

        Raises UserError, naming the process that holds it.
        """
        if self._folder is not None and self._lock is not None and os.access(self._folder, os.W_OK):
            self._lock.take()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
