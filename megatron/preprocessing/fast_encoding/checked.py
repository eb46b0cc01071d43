"""Encode with a fast backend wherever it is verified to give the reference's ids, and keep verifying on samples.

A text goes to the reference if it contains a code point on which the two differ, or spells an added token; all others,
pure ASCII always, go to the backend. A sample of these is encoded by both: a difference raises an alarm with the code
points to blame. The caller then makes an encoder that leaves these to the reference and encodes again every chunk with
one of them, which `first_seen` identifies. No torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os.path import commonprefix

import numpy as np

from megatron.arrays import Ids, flat, sizes_of, split, surrounded
from megatron.preprocessing.fast_encoding.backends import BACKENDS, Encode, backend_versions, token_bytes
from megatron.preprocessing.fast_encoding.borders import Borders
from megatron.preprocessing.fast_encoding.comparison import REFERENCE_ALONE, Comparison, bare_encoder, widen
from megatron.preprocessing.fast_encoding.long_words import LONG_CHARACTERS, LongWords
from megatron.preprocessing.fast_encoding.probes import (
    CODE_POINTS,
    EVERYTHING,
    UNTRIED,
    Ranges,
    blame,
    different_texts,
    table_of,
    union,
)
from megatron.preprocessing.fast_encoding.text_pieces import pieces
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import TokenizerSettings

SAMPLE_EVERY = 1024  # one piece of text in so many is encoded by both
SAMPLED_CHARACTERS = 16_384  # of each sampled piece, at most
GROUP_BYTES = 2 << 20  # passed to a library at once, which bounds its memory
SCANNED_CHARACTERS = 1 << 18  # scanned at once, which bounds the memory for the scan


@dataclass
class Encoded:
    """Concatenated ids of several texts, the number of ids of each, and observations.

    alarm: code points to blame for a difference; the ids are then invalid. first_seen: code points beyond ASCII that
    this encoder passed to the backend for the first time. by_reference: texts, or pieces of them, that the reference
    encoded.
    """

    ids: Ids
    sizes: Ids
    alarm: Ranges = ()
    first_seen: list[int] = field(default_factory=list)
    by_reference: int = 0


class CheckedEncoder:
    """A tokenizer with a fast backend, or without one (None)."""

    def __init__(
        self, reference: Tokenizer, fast: Encode | None, comparison: Comparison, sample_every: int = SAMPLE_EVERY
    ) -> None:
        self.vocab_size, self.end_of_document = reference.vocab_size, reference.end_of_document
        self.affixes = reference.affixes
        self._reference, self._fast = reference, fast
        self._cuts, self._runs = comparison.cuts, comparison.runs
        self._borders = Borders(reference) if comparison.borders else None
        self.fingerprint = reference.fingerprint
        self._dtype = np.uint16 if reference.vocab_size <= 1 << 16 else np.uint32
        self._forbidden = table_of(comparison.differing)
        self._all_forbidden = comparison.differing == EVERYTHING
        self._seen = np.zeros(CODE_POINTS, bool)
        self._sample_every, self._count = sample_every, 0
        self._marks = _common_beginnings(reference.added_tokens)

    def encode(self, texts: Sequence[str], bare: bool = False) -> Encoded:
        """Ids of texts without surrogates, as the reference gives them; bare: without the affixes."""
        if not self._cuts:
            return self._encode_whole(texts, bare)
        result, sizes = Encoded(np.empty(0), np.empty(0)), np.zeros(len(texts), np.int64)
        found = bytearray()  # grows without being copied
        for owners, group in self._groups(texts):
            ids, piece_sizes = self._encode_pieces(group, result)
            found += ids.astype(self._dtype, copy=False).data
            np.add.at(sizes, owners, piece_sizes)
        result.ids, result.sizes = np.frombuffer(found, self._dtype), sizes
        return result if bare else self._with_affixes(result)

    def encode_parts(self, documents: Sequence[Sequence[str]]) -> Encoded:
        """Ids of the parts of each document, without affixes: see `Tokenizer.encode_parts`. sizes: of all parts."""
        if self._reference.parts_stand_alone:
            return self.encode([part for parts in documents for part in parts], bare=True)
        found = [ids for parts in documents for ids in self._reference.encode_parts(parts)]
        return Encoded(*flat(found), by_reference=len(documents))

    def _groups(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
        """Batches of a few megabytes of the pieces of all texts, with the index of the text of each."""
        owners, group, size = list[int](), list[str](), 0
        for number, text in enumerate(texts):
            for piece in pieces(text, self._reference.added_tokens):
                owners.append(number)
                group.append(piece)
                size += len(piece) if piece.isascii() else 3 * len(piece)
                if size >= GROUP_BYTES:
                    yield owners, group
                    owners, group, size = [], [], 0
        if group:
            yield owners, group

    def _encode_whole(self, texts: Sequence[str], bare: bool) -> Encoded:
        """Encode with the reference alone; long texts in pieces, if its vocabulary has borders."""
        if self._borders is None or all(len(text) <= LONG_CHARACTERS for text in texts):
            encode = bare_encoder(self._reference) if bare else self._reference.encode_arrays
            return Encoded(*encode(list(texts)), by_reference=len(texts))
        arrays = [self._borders.encode(text) for text in texts]
        ids = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        result = Encoded(ids, sizes_of(arrays), by_reference=len(texts))
        return result if bare else self._with_affixes(result)

    def _encode_pieces(self, texts: list[str], result: Encoded) -> tuple[Ids, Ids]:
        """Ids without affixes in the order of the texts, each encoded by its side; observations go to `result`."""
        prepared = [text if text.isascii() else self._reference.normalized(text) for text in texts]
        goes_fast = [self._may_go_fast(text, result.first_seen) for text in prepared]
        fast = [text for text, ok in zip(prepared, goes_fast, strict=True) if ok]
        # The original text: added tokens are matched before normalization.
        slow = [text for text, ok in zip(texts, goes_fast, strict=True) if not ok]
        result.by_reference += len(slow)
        result.alarm = result.alarm or self._compare_sample(fast)
        if self._fast is None or not fast:
            return self._bounded(slow, bare_encoder(self._reference))
        if not slow:
            return self._bounded(fast, self._fast)
        fast_parts = iter(split(*self._bounded(fast, self._fast)))
        slow_parts = iter(split(*self._bounded(slow, bare_encoder(self._reference))))
        return flat([next(fast_parts if ok else slow_parts) for ok in goes_fast])

    def _bounded(self, texts: Sequence[str], encode: Encode) -> tuple[Ids, Ids]:
        """The result of `encode`, with bounded memory for a piece that cannot be split."""
        if not self._runs or all(len(text) <= LONG_CHARACTERS for text in texts):
            return encode(texts)
        return self._long_words.encode(texts, encode)

    @cached_property
    def _long_words(self) -> LongWords:
        return LongWords(token_bytes(self._reference), self._runs, self._reference.added_tokens, self._dtype)

    def _may_go_fast(self, text: str, first_seen: list[int]) -> bool:
        if self._fast is None or self._all_forbidden or any(mark in text for mark in self._marks):
            return False
        if text.isascii():
            return True
        found = []
        for start in range(0, len(text), SCANNED_CHARACTERS):
            codes = np.frombuffer(text[start : start + SCANNED_CHARACTERS].encode("utf-32-le"), "<u4")
            if self._forbidden[codes].any():
                return False
            found.append(np.unique(codes[~self._seen[codes]]))
        for codes in found:
            self._seen[codes] = True
            first_seen += codes[codes >= 128].tolist()
        return True

    def _compare_sample(self, texts: list[str]) -> Ranges:
        """Encode a sample of the texts with both. Returns the code points to blame for a difference."""
        first = -self._count % self._sample_every
        self._count += len(texts)
        sampled = []
        for text in texts[first :: self._sample_every]:
            start = (self._count * 7919) % max(1, len(text) - SAMPLED_CHARACTERS)
            sampled.append(text[start : start + SAMPLED_CHARACTERS])
        return next((blame(text, self._differs) for text in sampled if self._differs(text)), ())

    def _differs(self, text: str) -> bool:
        if self._fast is None or not text:
            return False
        return any(True for _ in different_texts(bare_encoder(self._reference), self._fast, [text]))

    def _with_affixes(self, encoded: Encoded) -> Encoded:
        before, after = self.affixes
        if before or after:
            encoded.ids = surrounded(encoded.ids, encoded.sizes, before, after)
            encoded.sizes = encoded.sizes + len(before) + len(after)
        return encoded


@dataclass(frozen=True)
class EncoderSettings:
    """Settings from which a process makes its encoder, by calling them; picklable and comparable.

    comparison: by default all texts go to the tokenizer's own library, unsplit.
    """

    tokenizer: TokenizerSettings
    comparison: Comparison = REFERENCE_ALONE
    sample_every: int = SAMPLE_EVERY

    @property
    def in_threads(self) -> bool:
        """Fast backends release the GIL while they work; the tokenizer's own library builds Python lists."""
        return self.comparison.backend in BACKENDS

    def __call__(self) -> CheckedEncoder:
        """The encoder. Raises what `build_tokenizer` raises."""
        tokenizer, backend = self.tokenizer(), self.comparison.backend
        fast = BACKENDS[backend].build(tokenizer) if backend in BACKENDS else None
        return CheckedEncoder(tokenizer, fast, self.comparison, self.sample_every)

    def widened(self, found: Ranges) -> "EncoderSettings":
        """Settings that also leave these code points to the reference, in later runs as well."""
        return replace(self, comparison=widen(self.tokenizer(), self.comparison, found))

    def describe(self) -> str:
        """One line: the backend, and the number of code points that it does not handle."""
        name = self.comparison.backend
        if name not in BACKENDS:
            return "backend: the tokenizer's own library"
        count = sum(stop - start for start, stop in union(self.comparison.differing, UNTRIED))
        count -= sum(stop - start for start, stop in UNTRIED)
        return (
            f"backend: {backend_versions(name).split(', ')[-1]}; texts with one of {count:,} code points on which "
            f"it differs go to the tokenizer's own library"
        )


def _common_beginnings(tokens: Sequence[str]) -> list[str]:
    """A small set of strings, one of which is in any text that contains one of `tokens`: fewer searches."""
    groups: dict[str, list[str]] = {}
    for token in tokens:
        groups.setdefault(token[:2], []).append(token)
    return [commonprefix(group) for group in groups.values()]  # noqa: RUF071 (no paths)
