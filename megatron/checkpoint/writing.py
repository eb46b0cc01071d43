"""Tensors of a checkpoint to disk, in torch's files, with failures that say what the disk said."""

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem


class _Stream:
    """A file that remembers how writing to it failed. In all else it is the file."""

    def __init__(self, file: io.IOBase) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Write to the file."""
        try:
            return int(cast(Any, self._file).write(content))
        except OSError as error:
            self.failure = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Files(FileSystem):
    """torch's access to files. Its writer of archives hides "No space left on device" behind a message of its own."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file; what is raised is what the file raised."""
        with super().create_stream(path, mode) as file:
            stream = _Stream(file)
            try:
                yield cast(io.IOBase, stream)
            except RuntimeError as error:
                raise (stream.failure or error) from None


class Writer(dcp.FileSystemWriter):
    """torch's writer of files, through the above."""

    def __init__(self, folder: Path) -> None:
        """Write into `folder`."""
        super().__init__(folder)
        self.fs = _Files()
