"""Parse raw chunks into texts: invalid text is replaced, lines that are not documents are listed. No torch."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron.errors import RunError
from megatron.preprocessing.chunks import Chunk, read_chunks
from megatron.preprocessing.sources import Span, is_on_disk
from megatron.preprocessing.text_streams import NOT_UTF_8, check_inputs
from megatron.text import well_formed

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MARKS = re.compile(rb"^(?:\xef\xbb\xbf)+", re.MULTILINE)


@dataclass
class ParsedChunk:
    """Texts of a chunk by key, and what was wrong with the other lines.

    repaired: documents in which U+FFFD replaced invalid UTF-8 or a lone surrogate.
    """

    texts: dict[str, list[str]]
    repaired: int = 0
    bad_lines: list[str] = field(default_factory=list)

    def add(self, values: dict[str, Any]) -> None:
        """Add a document that may contain surrogates; they are replaced and counted."""
        clean = {key: well_formed(value) for key, value in values.items()}
        self.repaired += clean != values
        for key, value in clean.items():
            self.texts[key].append(value)


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> ParsedChunk:
    """The texts under each of `keys` in a chunk's documents; a text file's one text is used for every key.

    A line that is not an object with a string under each key is listed in `bad_lines`; blank lines are skipped.
    """
    parsed = ParsedChunk({key: [] for key in keys})
    if chunk.columns:
        _parse_rows(chunk, keys, parsed)
    elif chunk.is_text:
        _parse_text(chunk, keys, parsed)
    else:
        _parse_lines(chunk, lines_of(chunk), keys, parsed)
    return parsed


def lines_of(chunk: Chunk) -> list[bytes]:
    """The lines of a chunk, including empty ones, without byte order marks."""
    return _without_marks(chunk.data).split(b"\n")


def read_texts(paths: Sequence[str], key: str) -> Iterator[str]:
    """The texts under `key` of all inputs, in order.

    Raises UserError for an input that is not text, RunError at the first bad line.
    """
    check_inputs([path for path in paths if is_on_disk(path)])
    for path in paths:
        for chunk in read_chunks(Span(path), [key]):
            parsed = parse_chunk(chunk, [key])
            if parsed.bad_lines:
                raise RunError(parsed.bad_lines[0])
            yield from parsed.texts[key]


def _without_marks(data: bytes) -> bytes:
    """Text without the byte order marks at the beginning of lines, where files were joined."""
    return _MARKS.sub(b"", data) if not data.isascii() and BYTE_ORDER_MARK in data else data


def _parse_text(chunk: Chunk, keys: Sequence[str], parsed: ParsedChunk) -> None:
    text, is_valid = _decoded(_without_marks(chunk.data))
    if not is_valid and chunk.is_single_byte_text:
        parsed.bad_lines.append(f"{chunk.source}: {NOT_UTF_8}")
        return
    parsed.add(dict.fromkeys(keys, text))
    parsed.repaired += not is_valid


def _parse_lines(chunk: Chunk, lines: list[bytes], keys: Sequence[str], parsed: ParsedChunk) -> None:
    texts = [parsed.texts[key] for key in keys]
    for number, line in enumerate(lines, start=chunk.start.line + 1):
        try:
            entry = orjson.loads(line)
            values = [entry[key] for key in keys]
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            values = []
        if values and all(type(value) is str for value in values):
            for found, value in zip(texts, values, strict=True):
                found.append(value)
        elif line.strip():
            _parse_by_hand(f"{chunk.source}, line {number}", line, chunk, keys, parsed)


def _parse_by_hand(name: str, line: bytes, chunk: Chunk, keys: Sequence[str], parsed: ParsedChunk) -> None:
    """Parse a line that orjson rejects: it holds invalid UTF-8, lone surrogates or NaN, or it is bad."""
    entry, is_valid = json_object(line, chunk)
    wrong = entry if isinstance(entry, str) else _without_text(entry, keys)
    if wrong or isinstance(entry, str):
        parsed.bad_lines.append(f"{name}: {wrong}")
        return
    before = parsed.repaired
    parsed.add({key: entry[key] for key in keys})
    parsed.repaired = before + (not is_valid or parsed.repaired > before)


def _parse_rows(chunk: Chunk, keys: Sequence[str], parsed: ParsedChunk) -> None:
    rows = zip(*(chunk.columns[key] for key in keys), strict=True)
    for number, row in enumerate(rows, start=chunk.start.line + 1):
        wrong = [key for key, value in zip(keys, row, strict=True) if not isinstance(value, str)]
        if wrong:
            parsed.bad_lines.append(f'{chunk.source}, row {number}: no text in the column "{wrong[0]}"')
        else:
            parsed.add(dict(zip(keys, row, strict=True)))


def json_object(line: bytes, chunk: Chunk) -> tuple[dict[str, Any] | str, bool]:
    """The object in a line of `chunk`, or what is wrong with it; and whether the line was valid UTF-8."""
    text, is_valid = _decoded(line)
    if not is_valid and chunk.is_single_byte_text:
        return NOT_UTF_8, False
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at character {error.pos + 1}{_way_out(text)}", is_valid
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        return f"not readable: {error}", is_valid
    if isinstance(entry, dict):
        return entry, is_valid
    return f"not a JSON object but {type(entry).__name__}{_way_out(text)}", is_valid


def _way_out(line: str) -> str:
    """How to convert the usual forms of JSON that are not one object per line."""
    if line.strip() == "{":
        return "; an object must be on one line, as jq -c . FILE writes it"
    return "; jq -c '.[]' FILE writes the objects of a list one a line" if line.startswith("[") else ""


def _without_text(entry: dict[str, Any], keys: Sequence[str]) -> str:
    """What is wrong with an object that has no string under one of `keys`; empty if it has."""
    missing = [key for key in keys if not isinstance(entry.get(key), str)]
    return f'no text under the key "{missing[0]}" (keys: {", ".join(entry)})' if missing else ""


def _decoded(data: bytes) -> tuple[str, bool]:
    """The text, and whether it was valid UTF-8; invalid bytes become U+FFFD."""
    try:
        return data.decode(), True
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace"), False
