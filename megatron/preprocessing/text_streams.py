"""The text of inputs as a stream of UTF-8 bytes, whatever their compression and encoding; no text is refused. No torch.

UTF-16 and UTF-32 are decoded by their byte order mark. The mark stays in the stream, as U+FEFF: files that were joined
have one in their middle too, so it is removed where lines are parsed.
"""

import codecs
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from megatron.errors import RunError, UserError
from megatron.preprocessing.compressed import damage_named, has_signature, unpacked
from megatron.text_files import (
    SIGNATURE_BYTES,
    converted,
    encoding_of,
    is_single_byte_text,
    way_out,
    what_instead_of_text,
)

CHECKED_INPUTS = 1000  # before the work starts; the others are checked when they are read
NOT_UTF_8 = f"not UTF-8 but probably Latin-1, Windows-1252 or the like; {converted('WINDOWS-1252')}"
_ENDINGS_OF = {"gzip data": ".gz", "Zstandard data": ".zst"}


def open_text(path: str, raw: BinaryIO) -> BinaryIO:
    """The content of the file `raw`, which `path` names, as UTF-8. Raises UserError where it is not text.

    Text that is invalid in UTF-16 or UTF-32 becomes the byte 0xff, which is invalid in UTF-8 too.
    """
    content = unpacked(path, raw)
    head = _read(content, SIGNATURE_BYTES)
    _require_text(path, head)
    encoding, _ = encoding_of(head)
    joined = _Joined(head, content)
    return joined if encoding == "utf-8" else _Transcoded(joined, encoding)  # type: ignore[return-value]


def check_text(path: str, file: BinaryIO) -> None:
    """Raise UserError where an uncompressed file, open at its beginning, is not text; it is rewound."""
    _require_text(path, file.read(SIGNATURE_BYTES))
    file.seek(0)


def is_utf8(path: str) -> bool:
    """Whether an uncompressed file can be read from the middle: it has no byte order mark of UTF-16 or UTF-32."""
    with Path(path).open("rb") as file:
        return encoding_of(file.read(4))[0] == "utf-8"


def check_inputs(paths: Sequence[str], single_bytes: bool = True) -> None:
    """Read the first bytes of files, so that what is not text is refused before the work starts.

    single_bytes: refuse Latin-1 and the like as well. Raises UserError with a line for each such file.
    """
    problems = [problem for path in paths[:CHECKED_INPUTS] if (problem := _problem(path, single_bytes))]
    if problems:
        raise UserError(*problems[:10], *([f"... and {len(problems) - 10:,} more"] if problems[10:] else []))


def _problem(path: str, single_bytes: bool) -> str | None:
    head = b""
    try:
        with Path(path).open("rb") as file:
            packed = file.read(SIGNATURE_BYTES)
            if packed and not has_signature(path, packed):
                return f"{path} is not a {path.rpartition('.')[2]} file, as its name says it is; rename it"
            if path.endswith(".parquet"):
                return None
            file.seek(0)
            with suppress(RunError), damage_named(path):  # damage is reported with its place when the file is read
                head = _read(unpacked(path, file), SIGNATURE_BYTES)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    if single_bytes and encoding_of(head)[1] == 0 and is_single_byte_text(head):
        return _no_text(path, head) or f"{path} is {NOT_UTF_8}"
    return _no_text(path, head)


def _require_text(path: str, head: bytes) -> None:
    if problem := _no_text(path, head):
        raise UserError(problem)


def _no_text(path: str, head: bytes) -> str | None:
    kind = what_instead_of_text(head)
    if kind is None:
        return None
    if path == "-":
        return f"standard input is {kind}, not UTF-8 text; {way_out(kind)}"
    ending = "" if path.endswith((".gz", ".zst")) else _ENDINGS_OF.get(kind)
    return (
        f"{path} is {kind}, not UTF-8 text; " + (f"rename it to {path}{ending}, or " if ending else "") + way_out(kind)
    )


def _read(content: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, or all if there are fewer; unlike the `read` of a raw stream, which may return less."""
    parts: list[bytes] = []
    while size and (data := content.read(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


class _Joined(io.RawIOBase):
    """Bytes that were read already, and the stream that they came from."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        data = data or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end  # which "surrogateescape" encodes as 0xff


codecs.register_error("deepy_invalid", _invalid)


class _Transcoded(io.RawIOBase):
    """Text in another encoding as UTF-8."""

    def __init__(self, raw: io.RawIOBase, encoding: str) -> None:
        self._raw = raw
        self._decode: Callable[[bytes, bool], str] = codecs.getincrementaldecoder(encoding)("deepy_invalid").decode
        self._text = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and not self._ended:
            data = self._raw.read(len(buffer)) or b""
            self._ended = not data
            self._text = self._decode(data, self._ended).encode("utf-8", "surrogateescape")
        data, self._text = self._text[: len(buffer)], self._text[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
