"""Write tensors in torch's file format, and report the error of the disk if that fails."""

import io
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem


class _Stream:
    """A file that counts what is written to it, and remembers how writing failed."""

    def __init__(self, file: io.IOBase, written: Callable[[int], object]) -> None:
        self._file, self._written = file, written
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Write to the file, and remember an OSError."""
        try:
            count = int(cast(Any, self._file).write(content))
        except OSError as error:
            self.failure = error
            raise
        self._written(count)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Files(FileSystem):
    """torch's file access, whose archive writer hides "No space left on device" behind another message."""

    def __init__(self, written: Callable[[int], object]) -> None:
        super().__init__()
        self._written = written

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file for a block; raises the file's own OSError if writing failed with one."""
        with super().create_stream(path, mode) as file:
            stream = _Stream(file, self._written)
            try:
                yield cast(io.IOBase, stream)
            except RuntimeError as error:
                raise (stream.failure or error) from None


class Writer(dcp.FileSystemWriter):
    """torch's writer, with the file access above."""

    def __init__(self, folder: Path, written: Callable[[int], object] = lambda count: None) -> None:
        """Write into `folder`, one tensor after the other. written: is called with the bytes of each piece.

        Copying ahead would gain nothing: memory that is not pinned is copied synchronously, and what is in host memory
        already would only make the writing thread wait for the kernels of the training.
        """
        super().__init__(folder, per_thread_copy_ahead=0)
        self.fs = _Files(written)
