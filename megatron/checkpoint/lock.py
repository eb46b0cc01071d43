"""One writer to a folder of checkpoints: two runs in the same one would delete and overwrite each other's.

A POSIX record lock on `<save>/.lock`. The kernel gives it back when the process ends, by signal 9 as well, so that no
stale one is left; other than with flock, processes that were forked from the holder do not hold it on. Floor 5.
"""

import fcntl
import json
import logging
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

from megatron.errors import UserError

log = logging.getLogger(__name__)

LOCK = ".lock"


class SaveLock:
    """The right to write into a folder. A context manager: the right ends with the block."""

    def __init__(self, folder: Path | None) -> None:
        """folder: None for a process that writes nothing."""
        self._path = folder and folder / LOCK
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock, unless it is taken already; nothing to do yet while the folder is not there.

        Raises UserError, naming the process that holds it. Where files cannot be locked (Lustre mounted without
        `flock`, for one), says so and goes on.
        """
        if self._path is None or self._descriptor is not None or not os.access(self._path.parent, os.W_OK):
            return
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"save: {self._path} cannot be written to: {error.strerror}") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise UserError(
                f"save ({self._path.parent}) is being written to by another run: {_holder(self._path)}. "
                "Wait for its end or stop it, or choose another folder"
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): let no other run save there", self._path, error.strerror)
        self._descriptor = descriptor
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        with suppress(OSError):  # a full disk: what counts is the lock
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # which gives the lock back
            self._descriptor = None


def _holder(path: Path) -> str:
    """Who wrote into the lock file, as far as it can be told."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "one that has only just begun"
