r"""Find where two implementations of one tokenizer differ, by comparing them on every code point.

Libraries differ in the Unicode tables behind `\p{L}`, `\p{N}` and `\s`. Each code point is put into surroundings that
distinguish the classes of all known patterns, and both sides encode it with a vocabulary of pairs of bytes, whose ids
show every boundary between words. The two differ on a code point if the ids do. In a text without such code points all
characters have the same classes on both sides, so that it is split into the same words. Words become ids by the
tokenizer's own merges, which are compared on the whole vocabulary. No torch.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, product

import numpy as np

from megatron.arrays import Ids, split
from megatron.preprocessing.fast_encoding.backends import Encode
from megatron.preprocessing.fast_encoding.text_pieces import split_offsets

Ranges = tuple[tuple[int, int], ...]  # half-open ranges of code points

CODE_POINTS = 0x110000
EVERYTHING: Ranges = ((0, CODE_POINTS),)
# Private use and unassigned planes: not compared, but left to the reference.
UNTRIED: Ranges = ((0xD800, 0xF900), (0x18E00, 0x1AFF0), (0x33500, 0xE0000), (0xE0200, CODE_POINTS))
SURROUNDINGS = "a{c}a A{c}A 12{c}4 !!{c}a a'{c}a \n{c} {c}\r\n{c}{c}"
SNIPPETS = ["a", "B", "the", " ", "  ", "\n", "\r\n", "\t", "'s", "'", "'LL", "1", "234", *".!(=_/-\x00"]
WIDE_SNIPPETS = ["中文", "。", "ひら", "カナ", "한글", "é", "ß", "Ж", "🦊", "\u0301", "\u00a0", "\u3000", "٣"]
BATCH = 4096


def probe_tokens() -> list[bytes]:
    """A vocabulary that shows boundaries: all bytes, then all pairs whose bytes belong to two characters."""
    ascii_bytes, leading, trailing = range(128), range(0xC2, 0xF5), range(0x80, 0xC0)
    pairs = [*product(ascii_bytes, leading), *product(trailing, ascii_bytes), *product(trailing, leading)]
    pairs += product(ascii_bytes, ascii_bytes)
    return [bytes([value]) for value in range(256)] + [bytes(pair) for pair in pairs]


def differing_code_points(one: Encode, other: Encode, code_points: Iterable[int] | None = None) -> Ranges:
    """The code points beyond ASCII on which two encoders with `probe_tokens` differ, and those not compared."""
    tried = np.ones(CODE_POINTS, bool)
    tried[:128] = False
    tried[table_of(UNTRIED)] = False
    numbers = np.flatnonzero(tried).tolist() if code_points is None else code_points
    probes = (SURROUNDINGS.replace("{c}", chr(number)) for number in numbers)
    found = {ord(max(text)) for text in different_texts(one, other, probes)}
    return union(UNTRIED, ranges_of(found))


def different_texts(one: Encode, other: Encode, texts: Iterable[str]) -> Iterator[str]:
    """Those of `texts` that the two encode differently."""
    for batch in batches(texts):
        (ids, sizes), (other_ids, other_sizes) = one(batch), other(batch)
        if np.array_equal(ids, other_ids) and np.array_equal(sizes, other_sizes):
            continue
        pairs = zip(batch, split(ids, sizes), split(other_ids, other_sizes), strict=True)
        yield from (text for text, mine, theirs in pairs if not np.array_equal(mine, theirs))


def ascii_texts(count: int = 60_000) -> Iterator[str]:
    """All pairs of ASCII characters within a word, and random texts of a few characters."""
    characters = [chr(number) for number in range(128)]
    yield from (f"{pair}a{pair}1 {pair}" for pair in map("".join, product(characters, characters)))
    chance = random.Random(0)
    for _ in range(count // 2):
        yield "".join(chance.choices(SNIPPETS, k=12))
        yield "".join(chance.choices(characters, k=12))


def mixed_texts(count: int = 20_000) -> Iterator[str]:
    """Random texts of several scripts, punctuation and spaces."""
    chance = random.Random(1)
    for _ in range(count):
        yield "".join(chance.choices(SNIPPETS + WIDE_SNIPPETS, k=16))


def cuts_are_safe(encode: Encode, count: int = 5_000) -> bool:
    """Whether texts have the ids of their pieces when split at all `split_offsets`."""
    texts = list(mixed_texts(count))
    cut = [_cut_everywhere(text) for text in texts]
    whole, _ = encode(texts)
    in_pieces, _ = encode([piece for pieces in cut for piece in pieces])
    return np.array_equal(whole, in_pieces)


def blame(text: str, differs: Callable[[str], bool]) -> Ranges:
    """The code points to blame for a text on which two encoders differ: those beyond ASCII in its smallest such part.

    EVERYTHING if that part is ASCII: no set of code points explains the difference then.
    """
    end = _smallest(1, len(text), lambda length: differs(text[:length]))
    start = end - _smallest(1, end, lambda length: differs(text[end - length : end]))
    found = {ord(character) for character in text[start:end] if not character.isascii()}
    return ranges_of(found) if found else EVERYTHING


def table_of(ranges: Ranges) -> Ids:
    """A boolean table of all code points: whether each is in `ranges`."""
    table = np.zeros(CODE_POINTS, bool)
    for start, stop in ranges:
        table[start:stop] = True
    return table


def ranges_of(code_points: Iterable[int]) -> Ranges:
    """Sorted ranges of the numbers."""
    table = np.zeros(CODE_POINTS + 1, bool)
    table[list(code_points)] = True
    edges = np.flatnonzero(np.diff(np.concatenate([[False], table]).astype(np.int8))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def union(*several: Ranges) -> Ranges:
    """The union of several ranges."""
    table = np.any([table_of(ranges) for ranges in several], axis=0)
    return ranges_of(np.flatnonzero(table).tolist())


def batches(texts: Iterable[str], size: int = BATCH) -> Iterator[list[str]]:
    """`texts` in lists of `size`."""
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _cut_everywhere(text: str) -> list[str]:
    offsets = [0, *split_offsets(text), len(text)]
    return [text[start:stop] for start, stop in pairwise(offsets)]


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The smallest number in low..high for which `holds` is true, by bisection; it is true for `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return high
