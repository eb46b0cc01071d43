"""Documents out of text files: .jsonl (one object a line) and .txt (one document), plain, .gz or .zst.

Reading is split in two, so that the costly half runs in workers: `read_chunks` cuts files into raw pieces with their
line numbers, `parse_chunk` makes texts of a piece. Floor 2; no torch.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megatron.errors import RunError, UserError
from megatron.text import well_formed

COMPRESSIONS = ("", ".gz", ".zst")
ENDINGS = tuple(kind + compression for kind in (".jsonl", ".json", ".txt") for compression in COMPRESSIONS)
CHUNK_BYTES = 1 << 20
CHUNK_LINES = 512
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: lines of JSON, or the whole of a text file.

    first_line: number of its first line, from 1; 0 marks a text file. bytes_read: of the file on the disk so far, this
    piece included.
    """

    path: str
    first_line: int
    pieces: tuple[bytes, ...]
    bytes_read: int


@dataclass
class ParsedChunk:
    """Texts of a chunk by key, and what was wrong with the rest.

    repaired: documents in which U+FFFD stands for invalid UTF-8 or a lone surrogate.
    """

    texts: dict[str, list[str]]
    repaired: int = 0
    bad_lines: list[str] = field(default_factory=list)


def find_inputs(names: str) -> list[str]:
    """The files that a comma-separated list of files, folders and patterns (`data/*.jsonl`) stands for, in order.

    Raises UserError for a name that stands for nothing, or a file whose ending is not one of ENDINGS.
    """
    found: list[str] = []
    for name in (name.strip() for name in names.split(",")):
        path = Path(name)
        if path.is_dir():
            matches = sorted(str(entry) for entry in path.iterdir() if entry.name.endswith(ENDINGS))
        else:
            matches = [name] if path.is_file() else sorted(map(str, path.parent.glob(path.name)))
        if not matches:
            raise UserError(f'input "{name}": no such file, and no {"/".join(ENDINGS[:3])} file in such a folder')
        found += matches
    wrong = [path for path in found if not path.endswith(ENDINGS)]
    if wrong:
        raise UserError(*(f"{path}: Deepy reads files ending in {', '.join(ENDINGS)}" for path in wrong))
    return found


def read_chunks(path: str) -> Iterator[Chunk]:
    """Cut one file into chunks of about a megabyte. Raises RunError for one that is damaged or cut short."""
    with Path(path).open("rb") as raw, _damage_named(path):
        unpacked = _unpacked(path, raw)
        if path.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
            yield Chunk(path, 0, (unpacked.read(),), raw.tell())
            return
        first, lines, size = 1, list[bytes](), 0
        for line in unpacked:
            lines.append(line)
            size += len(line)
            if size >= CHUNK_BYTES or len(lines) >= CHUNK_LINES:
                yield Chunk(path, first, tuple(lines), raw.tell())
                first, lines, size = first + len(lines), [], 0
        yield Chunk(path, first, tuple(lines), raw.tell())


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> ParsedChunk:
    """The texts under each of `keys` in a chunk's documents; a text file's one text stands under every key.

    A line that is not an object with a string under each key is listed in `bad_lines`; blank lines are passed over.
    """
    parsed = ParsedChunk({key: [] for key in keys})
    for number, piece in enumerate(chunk.pieces, start=chunk.first_line):
        if number <= 1:
            piece = piece.removeprefix(BYTE_ORDER_MARK)
        text, is_valid = _decoded(piece)
        if chunk.first_line and not text.strip():
            continue
        values = _values(text, keys) if chunk.first_line else dict.fromkeys(keys, text)
        if isinstance(values, str):
            parsed.bad_lines.append(f"{chunk.path}, line {number}: {values}")
            continue
        clean = {key: well_formed(value) for key, value in values.items()}
        parsed.repaired += not is_valid or clean != values
        for key, value in clean.items():
            parsed.texts[key].append(value)
    return parsed


def read_texts(paths: Sequence[str], key: str) -> Iterator[str]:
    """The texts under `key` of all files, in order. Raises RunError at the first bad line."""
    for path in paths:
        for chunk in read_chunks(path):
            parsed = parse_chunk(chunk, [key])
            if parsed.bad_lines:
                raise RunError(parsed.bad_lines[0])
            yield from parsed.texts[key]


def _values(line: str, keys: Sequence[str]) -> dict[str, str] | str:
    """The strings under `keys`, or what is wrong with the line."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        return f"not readable: {error}"
    if not isinstance(entry, dict):
        return f"not a JSON object but {type(entry).__name__}"
    for key in keys:
        if not isinstance(entry.get(key), str):
            return f'no text under the key "{key}" (keys: {", ".join(entry)})'
    return {key: entry[key] for key in keys}


def _decoded(piece: bytes) -> tuple[str, bool]:
    """The text, and whether it was valid UTF-8; what is not becomes U+FFFD."""
    try:
        return piece.decode(), True
    except UnicodeDecodeError:
        return piece.decode("utf-8", "replace"), False


def _unpacked(path: str, raw: BinaryIO) -> BinaryIO:
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstandardFrames(raw), CHUNK_BYTES)
    return raw


class _ZstandardFrames(io.RawIOBase):
    """All frames of a .zst file. Unlike zstandard's own reader it notices a file that was cut short."""

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
        """Unpack a little more; False at the end of the file."""
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


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise RunError(f"{path} is damaged or was cut short: {error}") from error
