"""The words and bytes of text, which perplexities of models with different tokenizers are compared by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron.data.windows import TokenStream
from megatron.tokenizer.base import Tokenizer, UnknownTextError

PIECE = 1_000_000  # tokens that are decoded together
OVERLAP = 16  # tokens before a piece that tell a decoder how the piece begins
PROBED_CHARACTERS = 10_000


@dataclass(frozen=True)
class TextSize:
    """What was scored.

    words, bytes: of the text; None where the ids do not tell. entropy: of single tokens by their frequency in this
    text, in nats per token. reason: why words or bytes are None.
    """

    tokens: int
    words: int | None
    bytes: int | None
    entropy: float
    reason: str = ""


def measure_text(stream: TokenStream, tokenizer: Tokenizer) -> TextSize:
    """Words (runs without white space) and UTF-8 bytes of the documents' text.

    Tokens that the tokenizer puts around a text and ends of documents are not text.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    markers = sorted({tokenizer.end_of_document, *tokenizer.affixes[0], *tokenizer.affixes[1]})
    words = size = spaced = 0
    sample = ""
    for before, ids in _texts(stream, markers):
        text = tokenizer.decode_continuation(before, ids)
        begins_within_word = text[:1].strip() and before and tokenizer.decode(before)[-1:].strip()
        words += len(text.split()) - bool(begins_within_word)
        size += len(text.encode())
        spaced += not before and text.startswith(" ") and not text[1:2].isspace()
        if len(sample) < PROBED_CHARACTERS:
            sample += text[:PROBED_CHARACTERS] + "\n"
    for start in range(0, stream.num_tokens, PIECE):
        counts += np.bincount(stream.tokens(start, PIECE), minlength=len(counts))
    unknown = 0 if tokenizer.unknown in (None, *markers) else int(counts[tokenizer.unknown])
    keeps_words, keeps_bytes = (False, False) if unknown else _kept(tokenizer, sample)
    if _begins_with_space(tokenizer, sample):
        size -= spaced
    return TextSize(
        stream.num_tokens,
        words if keeps_words else None,
        size if keeps_bytes else None,
        unigram_entropy(counts),
        _reason(unknown, keeps_words, keeps_bytes),
    )


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` [v] describe: the loss of predicting by frequency alone."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _texts(stream: TokenStream, markers: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The runs of ids between `markers`, each after the last ids of the same run that were given before.

    A run longer than `PIECE` comes in pieces; all but the first one have ids before them.
    """
    before, rest = list[int](), np.zeros(0, dtype=np.int64)
    for start in range(0, stream.num_tokens, PIECE):
        rest = np.concatenate([rest, stream.tokens(start, PIECE)])
        *whole, rest = np.split(rest, np.flatnonzero(np.isin(rest, markers)) + 1)
        for run in whole:
            if len(run) > 1:
                yield before, run[:-1].tolist()
            before = []
        if len(rest) > PIECE:
            yield before, rest.tolist()
            before, rest = rest[-OVERLAP:].tolist(), rest[:0]
    if len(rest):
        yield before, rest.tolist()


def _kept(tokenizer: Tokenizer, sample: str) -> tuple[bool, bool]:
    """Whether a text has as many words, and as many bytes, after it was encoded and decoded.

    Tried with words of `sample`, joined and spaced in several ways. Texts that the vocabulary cannot express tell
    nothing.
    """
    found = list(dict.fromkeys(sample.split()))
    made_up = _begins_with_space(tokenizer, sample)
    keeps_words = keeps_bytes = True
    for one, other in pairwise(found[:50]):
        separators = ("", " ", "  ", ", ", ".", "\n")
        for text in (*(one + space + other for space in separators), f" {one} ", one.upper(), one.lower(), f"{one} é"):
            try:
                ids = tokenizer.encode_bare([text])[0]
            except UnknownTextError:
                continue
            if tokenizer.unknown is not None and tokenizer.unknown in ids:
                continue
            decoded = tokenizer.decode(ids)
            if made_up and not text.startswith(" "):
                decoded = decoded.removeprefix(" ")
            keeps_words &= len(decoded.split()) == len(text.split())
            keeps_bytes &= len(decoded.encode()) == len(text.encode())
    return keeps_words, keeps_bytes


def _begins_with_space(tokenizer: Tokenizer, sample: str) -> bool:
    """Whether the tokenizer puts a space before each text that has none, which stays when the text is decoded."""
    word = next(iter(sample.split()), "")
    return tokenizer.decode(tokenizer.encode_bare([word])[0]) == f" {word}"


def _reason(unknown: int, keeps_words: bool, keeps_bytes: bool) -> str:
    if unknown:
        return f"words and bytes are not known: {unknown:,} tokens stand for text that the vocabulary lacks"
    lost = [name for name, kept in (("words", keeps_words), ("bytes", keeps_bytes)) if not kept]
    if not lost:
        return ""
    return f"{' and '.join(lost)} are not known: this tokenizer changes text, and ids do not tell how it was written"
