"""Cut inputs into raw chunks, which workers parse (`documents.parse_chunk`). No torch.

A chunk holds the position of its end, from which reading can resume.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from megatron.preprocessing.compressed import Watched, damage_named
from megatron.preprocessing.sources import HUGGING_FACE, STANDARD_INPUT, Span, is_splittable
from megatron.preprocessing.tables import hugging_face_batches, parquet_batches, size_of
from megatron.preprocessing.text_streams import check_text, open_text
from megatron.text_files import is_single_byte_text

CHUNK_BYTES = 2 << 20


class Hash(Protocol):
    """A hash of the standard library."""

    def update(self, data: bytes, /) -> None:
        """Add data."""


@dataclass(frozen=True)
class Position:
    """How far an input was read: bytes of its content (decompressed, as UTF-8) or rows of a table, and lines."""

    offset: int = 0
    line: int = 0


@dataclass
class Chunk:
    """A part of an input: whole lines of JSON, the whole of a text file (`is_text`), or columns of a table.

    source: names the input in messages. start, end: its positions in the input. bytes_read: of the file on disk, up to
    the end of this chunk.
    """

    source: str
    data: bytes
    start: Position
    end: Position
    bytes_read: int
    is_text: bool = False
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Approximate size in bytes."""
        return len(self.data) + sum(size_of(value) for values in self.columns.values() for value in values)

    @cached_property
    def is_single_byte_text(self) -> bool:
        """Whether its bytes are text in Latin-1 or the like rather than UTF-8."""
        return is_single_byte_text(self.data)

    def release(self) -> None:
        """Free the data, also where others still hold a reference to the chunk."""
        self.data, self.columns = b"", {}


def read_chunks(
    span: Span,
    keys: Sequence[str] = ("text",),
    position: Position | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    digest: Hash | None = None,
) -> Iterator[Chunk]:
    """The chunks of one input after `position`, each of about `chunk_bytes` or one line.

    keys: columns to read of a table. digest: updated with every byte of the span, including those before `position`.
    Raises RunError for a file that is damaged or cut short, UserError for one that is not text.
    """
    position = position or Position()
    if span.path.startswith(HUGGING_FACE) or span.path.endswith(".parquet"):
        yield from _table_chunks(span.path, keys, position, chunk_bytes, digest)
    elif is_splittable(span.path):
        yield from _plain_chunks(span, position, chunk_bytes, digest)
    else:
        yield from _streamed_chunks(span.path, position, chunk_bytes, digest)


def _plain_chunks(span: Span, position: Position, chunk_bytes: int, digest: Hash | None) -> Iterator[Chunk]:
    source = f"{span.path} after byte {span.start}" if span.start else span.path
    with Path(span.path).open("rb") as file:
        check_text(span.path, file)
        begin = 0
        if span.start:  # a line that begins earlier belongs to the previous shard
            file.seek(span.start - 1)
            begin = span.start - 1 + len(file.readline())
        skipped = position.offset - begin if position.offset else 0
        while skipped > 0 and (data := file.read(min(skipped, chunk_bytes))):  # for the hash
            skipped -= len(data)
            if digest:
                digest.update(data)
        at = position if position.offset else Position(begin)
        if span.stop is not None and at.offset >= span.stop:
            return
        for data in _whole_lines(file, chunk_bytes, at.offset, span.stop):
            if digest:
                digest.update(data)
            end = _after(at, data)
            yield Chunk(source, data, at, end, end.offset)
            at = end


def _streamed_chunks(path: str, position: Position, chunk_bytes: int, digest: Hash | None) -> Iterator[Chunk]:
    """Compressed files, text in other encodings, text files that are one document, and standard input."""
    is_stdin = path == STANDARD_INPUT
    source = "standard input" if is_stdin else path
    with nullcontext(sys.stdin.buffer) if is_stdin else Path(path).open("rb") as raw, damage_named(path):
        content = open_text(path, Watched(raw, digest.update) if digest else raw)  # type: ignore[arg-type]
        skipped = position.offset
        while skipped and (data := content.read(min(skipped, chunk_bytes))):
            skipped -= len(data)
        if path.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
            if data := b"".join(iter(lambda: content.read(chunk_bytes), b"")):
                yield Chunk(path, data, position, Position(len(data)), raw.tell(), is_text=True)
            return
        for data in _whole_lines(content, chunk_bytes):
            end = _after(position, data)
            yield Chunk(source, data, position, end, end.offset if is_stdin else raw.tell())
            position = end


def _table_chunks(
    path: str, keys: Sequence[str], position: Position, chunk_bytes: int, digest: Hash | None
) -> Iterator[Chunk]:
    batches = hugging_face_batches if path.startswith(HUGGING_FACE) else parquet_batches
    for columns, bytes_read in batches(path, keys, position.offset, chunk_bytes):
        count = len(columns[keys[0]])
        end = Position(position.offset + count, position.line + count)
        yield Chunk(path, b"", position, end, bytes_read, columns=columns)
        position = end
    if digest and not path.startswith(HUGGING_FACE):
        with Path(path).open("rb") as file:
            while data := file.read(CHUNK_BYTES):
                digest.update(data)


def _whole_lines(content: BinaryIO, size: int, offset: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Blocks of about `size` bytes or one line, each ending with a line; only lines that begin before `stop`."""
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


def _after(position: Position, data: bytes) -> Position:
    return Position(position.offset + len(data), position.line + data.count(b"\n"))
