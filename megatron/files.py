"""Paths and files as users hand them over: expanded, compared, locked, and replaced as a whole."""

import errno
import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, Any, Self

from megatron.errors import UserError

log = logging.getLogger(__name__)


def expanded(path: str, name: str) -> str:
    """`path` with `~`, `~user`, `$VARIABLE` and `${VARIABLE}` replaced, as a shell would.

    name: the key or flag, for messages. Raises UserError for a variable that is not set or a user who does not exist.
    """
    unset = [word for word in re.findall(r"\$(?:(\w+)|\{(\w+)\})", path) if not set(word) & set(os.environ)]
    if unset:
        variable = "".join(unset[0])
        raise UserError(f'{name} ("{path}"): the environment variable {variable} is not set; export it or write it out')
    found = os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111 (Path.expanduser normalizes the rest as well)
    if found.startswith("~"):
        raise UserError(f'{name} ("{path}"): there is no user {found.partition("/")[0][1:] or "here"}; write "./~..."')
    return found


def is_file(path: str | Path) -> bool:
    """Whether there is such a file. Unlike Path.is_file, text that cannot be a path (too long, zero bytes) is none."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Whether there is such a folder. Unlike Path.is_dir, text that cannot be a path is none."""
    return os.path.isdir(path)  # noqa: PTH112


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder. Unlike Path.exists, text that cannot be a path is none."""
    return os.path.exists(path)  # noqa: PTH110


def refuse_overwriting(outputs: Mapping[str, str | Path], inputs: Mapping[str, str | Path]) -> None:
    """Raise UserError where an output is an input, by whatever spelling, symbolic or hard link.

    Both map what a message calls the path, such as a key or a flag, to the path.
    """
    sources: dict[object, tuple[str, str | Path]] = {}
    for name, path in inputs.items():
        sources.setdefault(_identity(path), (name, path))
    problems = []
    for output, target in outputs.items():
        if found := sources.get(_identity(target)):
            name, path = found
            problems.append(
                f"{output} ({target}) is {name} ({path}) itself and would overwrite it; choose another file"
            )
    if problems:
        raise UserError(*problems)


def _identity(path: str | Path) -> object:
    """Equal for two paths of one file only: device and inode, or the absolute path of a file that does not exist."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return os.path.realpath(path)
    except ValueError:  # a zero byte
        return str(path)
    is_device = not S_ISREG(status.st_mode) and not S_ISDIR(status.st_mode)  # a terminal, which nothing overwrites
    return object() if is_device else (status.st_dev, status.st_ino)


@contextmanager
def replaced_when_complete(path: Path, mode: str = "w", partial: Path | None = None) -> Iterator[IO[Any]]:
    """A file to write, which takes the name `path` when the block ends well and leaves nothing when it does not.

    partial: its name until then; PATH.partial unless given. The folder is made where it is missing.
    """
    partial = partial or path.with_name(f"{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


class AppendedLines:
    """A file that lines are appended to. Where they cannot be, that is warned of once, until they can be again."""

    def __init__(self, path: Path, lost: str) -> None:
        """lost: what a failure means, such as "events are not recorded"."""
        self._path, self._lost, self._fails = path, lost, False

    def append(self, lines: str) -> None:
        """Append whole lines in one write. What a crash or a full disk left of a line before them stays apart."""
        data = lines.encode()
        try:
            with self._path.open("a+b", buffering=0) as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    data = data if file.read(1) == b"\n" else b"\n" + data
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._fails:
                log.warning("%s: %s cannot be written: %s", self._lost, self._path, error.strerror)
            self._fails = True
        else:
            self._fails = False


class FileLock:
    """The right of one process to write, held as a POSIX record lock on a file. `with` takes and releases it.

    The kernel releases it when the process ends, by signal 9 too, so no stale lock is left. Unlike with flock,
    processes forked from the holder do not keep it.
    """

    def __init__(
        self, path: Path, what: str, temporary: bool = False, abandoned: Collection[tuple[str, int]] = ()
    ) -> None:
        """path: of the lock file. what: is locked, at the beginning of messages, such as "save (checkpoints)".

        temporary: `release` deletes the lock file. abandoned: host and number of processes from whom the lock is taken
        away, such as those of a machine that no longer answers.
        """
        self._path, self._what, self._temporary, self._abandoned = path, what, temporary, abandoned
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock, unless this object holds it.

        Raises UserError, naming the process that holds it. Where files cannot be locked (Lustre mounted without
        `flock`, for one), warns and continues.
        """
        while self._descriptor is None:
            self._descriptor = self._locked_file()
            if not self._is_at_path(self._descriptor):  # its last holder deleted it in the meantime
                self.release()
        me = {"host": socket.gethostname(), "process": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        with suppress(OSError):  # a full disk: the lock itself is what counts
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(me).encode(), 0)

    def _locked_file(self) -> int:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{self._what}: {self._path} cannot be written: {error.strerror}") from error
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            holder = _holder(self._path)
            if holder is not None and (holder["host"], holder["process"]) in self._abandoned:
                log.warning("%s: the lock is taken from %s, which was given up", self._what, _in_words(holder))
                self._path.unlink(missing_ok=True)
                return self._locked_file()
            raise UserError(
                f"{self._what} is being written to by another run: {_in_words(holder)}. "
                "Wait until it ends or stop it, or write somewhere else"
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): let no other run write there", self._path, error.strerror)
        return descriptor

    def _is_at_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock back; nothing happens where it is not held."""
        if self._descriptor is not None:
            if self._temporary and self._is_at_path(self._descriptor):
                self._path.unlink(missing_ok=True)  # while it is locked: `take` notices
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class FolderLock:
    """The exclusive right of a run to write to a folder, so that two do not delete and overwrite each other's files.

    A context manager that releases it.
    """

    def __init__(self, folder: Path | None, key: str, abandoned: Collection[tuple[str, int]] = ()) -> None:
        """folder: None on ranks that write nothing. key: that names the folder. abandoned: as for `FileLock`."""
        self._folder = folder
        self._lock = None
        if folder is not None:
            self._lock = FileLock(folder / f".{key}.lock", f"{key} ({folder})", abandoned=abandoned)

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


def _holder(path: Path) -> dict[str, Any] | None:
    """Who wrote into the lock file: host, process and since; None where it does not say."""
    try:
        holder = json.loads(path.read_text())
        return {name: holder[name] for name in ("host", "process", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _in_words(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "one that has only just begun"
    return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
