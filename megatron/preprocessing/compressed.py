"""Decompress .gz and .zst files; a file that is damaged or was cut short is an error, not a shorter file. No torch."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import zstandard

from megatron.errors import RunError

COMPRESSIONS = ("", ".gz", ".zst")
SIGNATURES = {  # a .zst file may begin with a skippable frame
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + kind]) + b"\x2a\x4d\x18" for kind in range(16))),
    ".parquet": (b"PAR1", b"PARE"),
}


def has_signature(path: str, head: bytes) -> bool:
    """Whether a file that begins with `head` is of the binary format that its name's ending says, if it says one."""
    return all(head.startswith(known) for ending, known in SIGNATURES.items() if path.endswith(ending))


def unpacked(path: str, raw: BinaryIO) -> BinaryIO:
    """The decompressed content of the file `raw`, which `path` names."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        return _ZstandardFrames(raw)  # type: ignore[return-value]
    return raw


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Turn the libraries' errors into a RunError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise RunError(f"{path} is damaged or was cut short: {error}") from error


class Watched(io.RawIOBase):
    """A file that passes all data read from it to `note`, in order."""

    def __init__(self, raw: BinaryIO, note: Callable[[bytes], object]) -> None:
        self._raw = raw
        self._note = note

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer`. Returns the number of bytes."""
        data = self._raw.read(len(buffer))
        self._note(data)
        buffer[: len(data)] = data
        return len(data)


class _ZstandardFrames(io.RawIOBase):
    """All frames of a .zst file. Unlike zstandard's own reader, it detects a file that was cut short."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = b""
        self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and self._advance():
            pass
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def _advance(self) -> bool:
        """Decompress the next data; False at the end of the file."""
        self._packed = self._packed or self._raw.read(1 << 16)
        if not self._packed:
            if self._frame is not None:
                raise EOFError("the last frame is not complete")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._text = self._frame.decompress(self._packed)
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None
        return True
