"""Encode a very long word in overlapping windows: the ids of the whole word, in the memory of one window.

Byte-pair encoding merges the pair of lowest rank first, and the leftmost of equal pairs. A sequence of tokens is the
encoding of its text if and only if each two neighbours are the encoding of theirs: the first merge across the border of
two tokens would also happen in the text of these two alone, because which merge comes first there depends on these two
only. So where two windows share a token at the same position, the tokens of the first window up to it and those of the
second window from it on are together the encoding of both.

This holds within one word. Windows therefore meet within a run of characters that patterns do not split (`RUNS`);
`safe_runs` finds out for each tokenizer which runs these are. A text without such a run is encoded whole. No torch.
"""

import random
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

from megatron.arrays import Ids, sizes_of
from megatron.preprocessing.fast_encoding.text_pieces import LOWER, PIECE_CHARACTERS, UNCASED, UPPER

WINDOW_CHARACTERS = PIECE_CHARACTERS
LONG_CHARACTERS = 2 * WINDOW_CHARACTERS  # texts up to this length are encoded whole
OVERLAP_CHARACTERS = 1 << 12
RUNS = {
    "one character": r"([\W_])\1*",
    "upper case": f"[{UPPER}]+",
    "lower case": f"[{LOWER}]+",
    "letters without case": f"[{UNCASED}]+",
    "letters": f"[{UPPER}{LOWER}{UNCASED}]+",
    "digits": "[0-9]+",
    "ends of lines": r"[\r\n]+",
}
EXAMPLES = {
    "one character": " \t\n=-'🦊\u0301\x00",
    "upper case": "ABCDEFGTÄÖ",
    "lower case": "abcdefgtäöяюъ",
    "letters without case": "中文字かなカナ한글กขكتאב",
    "letters": "abCDäЖя中かกك",
    "digits": "0123456789",
    "ends of lines": "\r\n",
}

Encode = Callable[[Sequence[str]], tuple[Ids, Ids]]


class LongWords:
    """Encodes texts, long ones in windows.

    token_bytes: the length of each token, by id. runs: names of RUNS in which windows can meet. whole: added tokens;
    windows meet neither in one nor among spaces, which one may absorb. dtype: of the ids.
    """

    def __init__(
        self,
        token_bytes: Ids,
        runs: Collection[str],
        whole: Sequence[str] = (),
        dtype: npt.DTypeLike = np.uint32,
        window: int = WINDOW_CHARACTERS,
        overlap: int = OVERLAP_CHARACTERS,
    ) -> None:
        self._token_bytes, self._whole, self._dtype = token_bytes, whole, dtype
        self._runs = [re.compile(RUNS[name], re.DOTALL) for name in runs]
        self._window, self._overlap = window, overlap

    def encode(self, texts: Sequence[str], encode: Encode) -> tuple[Ids, Ids]:
        """The result of `encode`, with bounded memory."""
        arrays = [self._in_windows(text, encode) for text in texts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays), sizes_of(arrays)

    def _in_windows(self, text: str, encode: Encode) -> Ids:
        with_added = any(token in text for token in self._whole)
        found = bytearray()  # grows without being copied
        stop = self._meeting_offset(text, 0, with_added)
        ids = encode([text[:stop]])[0]
        while stop < len(text):
            overlap = text[stop - self._overlap : stop].encode()
            last = _Tail(ids, self._token_bytes, len(overlap))
            begin = last.first_offset(overlap)
            start = stop - len(overlap[begin:].decode())
            stop = self._meeting_offset(text, start, with_added)
            following = encode([text[start:stop]])[0]
            met = last.in_common(following[: len(overlap)], begin)
            if met is None:
                return encode([text])[0]
            found += ids[: met[0]].astype(self._dtype).data
            ids = following[met[1] :]
        found += ids.astype(self._dtype).data
        return np.frombuffer(found, self._dtype)

    def _meeting_offset(self, text: str, start: int, with_added: bool) -> int:
        """Where a window that begins at `start` can end."""
        for stop in range(start + self._window, len(text), self._overlap):
            around = text[stop - self._overlap : stop]
            if with_added and (around.isspace() or any(token in around for token in self._whole)):
                continue
            if any(run.fullmatch(around) for run in self._runs):
                return stop
        return len(text)


def safe_runs(token_bytes: Ids, encode: Encode, whole: Sequence[str], count: int = 40) -> tuple[str, ...]:
    """The names of RUNS in which windows of a tokenizer can meet: those that `count` random examples confirm."""
    chance, safe = random.Random(2), []
    for name, letters in EXAMPLES.items():
        texts = []
        for _ in range(count):
            run = chance.choice(letters) * 700 if name == "one character" else "".join(chance.choices(letters, k=700))
            texts.append("".join(chance.choices(["a", " ", "1", ".", "B", "\n", "中"], k=3)) + run + " a.")
        in_windows = LongWords(token_bytes, [name], whole, window=150, overlap=60)
        if np.array_equal(in_windows.encode(texts, encode)[0], encode(texts)[0]):
            safe.append(name)
    return tuple(safe)


class _Tail:
    """The last tokens of a window, with the offset of each in the last `length` bytes of its text."""

    def __init__(self, ids: Ids, token_bytes: Ids, length: int) -> None:
        offsets = length - np.cumsum(token_bytes[ids[: -length - 1 : -1]])[::-1]
        self._offsets = offsets[offsets >= 0]
        self._ids, self._token_bytes = ids[len(ids) - len(self._offsets) :], token_bytes
        self._before = len(ids) - len(self._ids)

    def first_offset(self, text: bytes) -> int:
        """The first offset in `text`, these last bytes, where a token and a character begin; 0 if there is none."""
        return next((int(offset) for offset in self._offsets if text[offset] & 0xC0 != 0x80), 0)

    def in_common(self, ids: Ids, begin: int) -> tuple[int, int] | None:
        """Indices of a token of the window that is also in `ids`, tokens of a text that begins at offset `begin`."""
        sizes = self._token_bytes[ids]
        offsets = begin + np.cumsum(sizes) - sizes
        _, mine, theirs = np.intersect1d(self._offsets, offsets, assume_unique=True, return_indices=True)
        same = np.flatnonzero(self._ids[mine] == ids[theirs])
        return (self._before + int(mine[same[0]]), int(theirs[same[0]])) if len(same) else None
