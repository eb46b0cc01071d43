"""Texts out of raw chunks: parsed, with invalid text replaced and lines that are no documents named.

No torch.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron.errors import RunError
from megatron.preprocessing.chunks import Chunk, read_chunks
from megatron.preprocessing.sources import Span
from megatron.text import well_formed

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class ParsedChunk:
    """Texts of a chunk by key, and what was wrong with the rest.

    repaired: documents in which U+FFFD stands for invalid UTF-8 or a lone surrogate.
    """

    texts: dict[str, list[str]]
    repaired: int = 0
    bad_lines: list[str] = field(default_factory=list)

    def add(self, values: dict[str, Any]) -> None:
        """A document that Python's own readers made, in which there may be surrogates."""
        clean = {key: well_formed(value) for key, value in values.items()}
        self.repaired += clean != values
        for key, value in clean.items():
            self.texts[key].append(value)


def parse_chunk(chunk: Chunk, keys: Sequence[str]) -> ParsedChunk:
    """The texts under each of `keys` in a chunk's documents; a text file's one text stands under every key.

    A line that is not an object with a string under each key is listed in `bad_lines`; blank lines are passed over.
    """
    parsed = ParsedChunk({key: [] for key in keys})
    if chunk.columns:
        _parse_rows(chunk, keys, parsed)
    elif chunk.is_text:
        text, is_valid = _decoded(chunk.data.removeprefix(BYTE_ORDER_MARK))
        parsed.add(dict.fromkeys(keys, text))
        parsed.repaired += not is_valid
    else:
        _parse_lines(chunk, lines_of(chunk), keys, parsed)
    return parsed


def lines_of(chunk: Chunk) -> list[bytes]:
    """The lines of a chunk, empty ones included."""
    data = chunk.data if chunk.start.offset else chunk.data.removeprefix(BYTE_ORDER_MARK)
    return data.split(b"\n")


def read_texts(paths: Iterable[str], key: str) -> Iterator[str]:
    """The texts under `key` of all inputs, in order. Raises RunError at the first bad line."""
    for path in paths:
        for chunk in read_chunks(Span(path), [key]):
            parsed = parse_chunk(chunk, [key])
            if parsed.bad_lines:
                raise RunError(parsed.bad_lines[0])
            yield from parsed.texts[key]


def _parse_lines(chunk: Chunk, lines: list[bytes], keys: Sequence[str], parsed: ParsedChunk) -> None:
    texts = [parsed.texts[key] for key in keys]
    for number, line in enumerate(lines, start=chunk.start.line + 1):
        try:
            entry = orjson.loads(line)
            values = [entry[key] for key in keys]
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            values = []
        if values and all(type(value) is str for value in values):
            for place, value in zip(texts, values, strict=True):
                place.append(value)
        elif line.strip():
            _parse_by_hand(f"{chunk.source}, line {number}", line, keys, parsed)


def _parse_by_hand(name: str, line: bytes, keys: Sequence[str], parsed: ParsedChunk) -> None:
    """A line that orjson is too strict for: invalid UTF-8, lone surrogates, NaN; or one that is bad."""
    entry, is_valid = json_object(line)
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


def json_object(line: bytes) -> tuple[dict[str, Any] | str, bool]:
    """The object in a line, or what is wrong with it; and whether the line was valid UTF-8, else repaired."""
    text, is_valid = _decoded(line)
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
    """For the usual forms of JSON that are not one object a line."""
    if line.strip() == "{":
        return "; an object must be on one line, as jq -c . FILE writes it"
    return "; jq -c '.[]' FILE writes the objects of a list one a line" if line.startswith("[") else ""


def _without_text(entry: dict[str, Any], keys: Sequence[str]) -> str:
    """What is wrong with an object that has no string under one of `keys`; empty if it has."""
    missing = [key for key in keys if not isinstance(entry.get(key), str)]
    return f'no text under the key "{missing[0]}" (keys: {", ".join(entry)})' if missing else ""


def _decoded(piece: bytes) -> tuple[str, bool]:
    """The text, and whether it was valid UTF-8; what is not becomes U+FFFD."""
    try:
        return piece.decode(), True
    except UnicodeDecodeError:
        return piece.decode("utf-8", "replace"), False
