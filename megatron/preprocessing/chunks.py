"""Cut inputs into raw chunks, which workers make texts of (`documents.parse_chunk`). No torch.

A chunk says where it ends, so that reading can go on from there.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron.preprocessing.compressed import Watched, damage_named, unpacked
from megatron.preprocessing.sources import HUGGING_FACE, LINES, STANDARD_INPUT, Span
from megatron.preprocessing.tables import hugging_face_batches, parquet_batches, size_of

CHUNK_BYTES = 2 << 20


class Hash(Protocol):
    """A hash of the standard library."""

    def update(self, data: bytes, /) -> None:
        """Take in more."""


@dataclass(frozen=True)
class Place:
    """How far an input was read: bytes of its unpacked content, or rows, and lines."""

    offset: int = 0
    line: int = 0


@dataclass
class Chunk:
    """A piece of an input: whole lines of JSON, the whole of a text file (`is_text`), or columns of a table.

    source: names the input in messages. start, end: the places between which it lies. bytes_read: of the file on the
    disk so far, this piece included.
    """

    source: str
    data: bytes
    start: Place
    end: Place
    bytes_read: int
    is_text: bool = False
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return len(self.data) + sum(size_of(value) for values in self.columns.values() for value in values)

    def release(self) -> None:
        """Give up what was read, which others may still hold the chunk of."""
        self.data, self.columns = b"", {}


def read_chunks(
    span: Span,
    keys: Sequence[str] = ("text",),
    place: Place | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    digest: Hash | None = None,
) -> Iterator[Chunk]:
    """The chunks of one input after `place`, each of about `chunk_bytes` or one line.

    keys: columns to read of a table. digest: is shown every byte of the span, what lies before `place` included.
    Raises RunError for a file that is damaged or cut short.
    """
    place = place or Place()
    if span.path.startswith(HUGGING_FACE) or span.path.endswith(".parquet"):
        yield from _table_chunks(span.path, keys, place, chunk_bytes, digest)
    elif span.path.endswith(LINES) or span.path == STANDARD_INPUT:
        yield from _plain_chunks(span, place, chunk_bytes, digest)
    else:
        yield from _unpacked_chunks(span.path, place, chunk_bytes, digest)


def _plain_chunks(span: Span, place: Place, chunk_bytes: int, digest: Hash | None) -> Iterator[Chunk]:
    is_stdin = span.path == STANDARD_INPUT
    source = f"{span.path} after byte {span.start}" if span.start else "standard input" if is_stdin else span.path
    with nullcontext(sys.stdin.buffer) if is_stdin else Path(span.path).open("rb") as file:
        begin = 0
        if span.start:  # a line that begins before belongs to the shard before
            file.seek(span.start - 1)
            begin = span.start - 1 + len(file.readline())
        skipped = place.offset - begin if place.offset else 0
        while skipped > 0 and (data := file.read(min(skipped, chunk_bytes))):  # for the hash
            skipped -= len(data)
            if digest:
                digest.update(data)
        at = place if place.offset else Place(begin)
        if span.stop is not None and at.offset >= span.stop:
            return
        for data in _whole_lines(file, chunk_bytes, at.offset, span.stop):
            if digest:
                digest.update(data)
            end = _after(at, data)
            yield Chunk(source, data, at, end, end.offset)
            at = end


def _unpacked_chunks(path: str, place: Place, chunk_bytes: int, digest: Hash | None) -> Iterator[Chunk]:
    with Path(path).open("rb") as raw, damage_named(path):
        content = unpacked(path, Watched(raw, digest.update) if digest else raw)  # type: ignore[arg-type]
        skipped = place.offset
        while skipped and (data := content.read(min(skipped, chunk_bytes))):
            skipped -= len(data)
        if path.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
            if data := b"".join(iter(lambda: content.read(chunk_bytes), b"")):
                yield Chunk(path, data, place, Place(len(data)), raw.tell(), is_text=True)
            return
        for data in _whole_lines(content, chunk_bytes):
            end = _after(place, data)
            yield Chunk(path, data, place, end, raw.tell())
            place = end


def _table_chunks(
    path: str, keys: Sequence[str], place: Place, chunk_bytes: int, digest: Hash | None
) -> Iterator[Chunk]:
    batches = hugging_face_batches if path.startswith(HUGGING_FACE) else parquet_batches
    for columns, position in batches(path, keys, place.offset, chunk_bytes):
        end = Place(place.offset + len(columns[keys[0]]), place.line + len(columns[keys[0]]))
        yield Chunk(path, b"", place, end, position, columns=columns)
        place = end
    if digest and not path.startswith(HUGGING_FACE):
        with Path(path).open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                digest.update(data)


def _whole_lines(content: BinaryIO, size: int, offset: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Pieces of `size` bytes or one line, each ending with a line; only lines that begin before `stop`."""
    rest: list[bytes] = []
    while data := content.read(size):
        if stop is not None and offset + len(data) >= stop and (cut := data.find(b"\n", max(0, stop - 1 - offset)) + 1):
            yield b"".join([*rest, data[:cut]])
            return
        offset += len(data)
        cut = data.rfind(b"\n") + 1
        if cut:
            yield b"".join([*rest, data[:cut]])
            rest = []
        rest.append(data[cut:])
    if any(rest):
        yield b"".join(rest)


def _after(place: Place, data: bytes) -> Place:
    return Place(place.offset + len(data), place.line + data.count(b"\n"))
