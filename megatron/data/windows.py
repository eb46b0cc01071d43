"""The tokens of sample i of a run: a pure function of (seed, tokens, i), without an index.

The tokens of one part of a corpus (train, valid or test) form a ring of T tokens. Each epoch rotates the ring by its
own offset and divides it into n = (T - 1) // s windows of s + 1 tokens. Neighbouring windows share one token, so every
token is a label exactly once, except the first one and a tail of fewer than s. A keyed permutation gives the order of
the windows. The number of steps, the batch size and the layout have no influence.

Letters: T tokens of the part, s sequence length, n samples per epoch. No torch.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.indexed import Ids, IndexedDataset
from megatron.errors import UserError
from megatron.seeds import seed_from

Tokens = npt.NDArray[np.int64]  # [length]; a sample with separate labels is [2, length]
NOT_A_LABEL = -100  # the label of a loss-masked token
_MASK = (1 << 64) - 1


class TokenStream(Protocol):
    """Tokens in a fixed order, with random access."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens `start` .. `start + length`, fewer at the end of the stream."""


class SampleSource(Protocol):
    """An infinite sequence of samples of s + 1 tokens. Can be pickled, for the workers of a loader."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the tokens."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the underlying stream."""

    def __getitem__(self, sample: int) -> Tokens:
        """Sample number `sample` >= 0 of the run; epoch `sample // samples_per_epoch`.

        Tokens [s + 1], whose labels are themselves; or [2, s + 1], tokens and the label of each (or `NOT_A_LABEL`).
        """


@dataclass(frozen=True)
class CorpusStream:
    """Tokens `start` .. `start + num_tokens` of an indexed dataset, each checked to be below `vocab_size`.

    are_labels: `NOT_A_LABEL` is allowed too.
    """

    dataset: IndexedDataset
    start: int
    num_tokens: int
    vocab_size: int
    are_labels: bool = False

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens `start` .. `start + length` of this part. Raises UserError for an id outside the vocabulary."""
        length = max(0, min(length, self.num_tokens - start))
        ids = self.dataset.tokens(self.start + start, length)
        return checked_ids(ids, self.vocab_size, self.dataset.prefix, self.are_labels)


def checked_ids(ids: Ids, vocab_size: int, prefix: str, are_labels: bool = False) -> Tokens:
    """`ids` as int64. Raises UserError, naming the file, for one outside the vocabulary.

    are_labels: `NOT_A_LABEL` is allowed too.
    """
    ids = ids.astype(np.int64)
    if len(ids) and (ids.max() >= vocab_size or ids.min() < 0):
        wrong = ids[((ids < 0) | (ids >= vocab_size)) & ~(are_labels & (ids == NOT_A_LABEL))]
        if len(wrong):
            raise UserError(
                f"{prefix}.bin holds the token id {int(wrong[0]):,}, but the tokenizer's ids are "
                f"0 to {vocab_size - 1:,}: these data were made with another tokenizer"
            )
    return ids


@dataclass(frozen=True)
class JoinedStreams:
    """The concatenation of several streams (a `TokenStream`)."""

    streams: tuple[TokenStream, ...]

    @property
    def num_tokens(self) -> int:
        """Total number of tokens."""
        return sum(stream.num_tokens for stream in self.streams)

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens `start` .. `start + length`, fewer at the end of the last stream."""
        pieces = [np.empty(0, dtype=np.int64)]
        for stream in self.streams:
            if start < stream.num_tokens and length > 0:
                pieces.append(stream.tokens(start, length))
            length -= max(0, min(length, stream.num_tokens - start))
            start = max(0, start - stream.num_tokens)
        return np.concatenate(pieces)


@dataclass(frozen=True)
class Windows:
    """Windows of `seq_length + 1` tokens of a stream: the samples of a run (a `SampleSource`).

    shuffle: rotate and permute in each epoch, for training; otherwise the windows are in order, from the first token.
    labels: as long as the stream, for samples with separate labels. The stream must contain at least one window.
    """

    stream: TokenStream
    seq_length: int
    seed: int
    shuffle: bool = True
    labels: TokenStream | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return self.stream.num_tokens

    @property
    def samples_per_epoch(self) -> int:
        """Complete windows in the stream, the same in every epoch."""
        return (self.num_tokens - 1) // self.seq_length

    def __getitem__(self, sample: int) -> Tokens:
        """Sample number `sample` of the run, [s + 1], or [2, s + 1] with labels."""
        start = self.start_of(sample)
        ids = self._around(self.stream, start)
        return ids if self.labels is None else np.stack([ids, self._around(self.labels, start)])

    def start_of(self, sample: int) -> int:
        """The offset of sample number `sample` in the stream; the sample may wrap around the end."""
        epoch, position = divmod(sample, self.samples_per_epoch)
        if not self.shuffle:
            return position * self.seq_length
        window = permuted(position, self.samples_per_epoch, derived_key(self.seed, "order", epoch))
        offset = derived_key(self.seed, "offset", epoch) % self.num_tokens
        return (offset + window * self.seq_length) % self.num_tokens

    def _around(self, stream: TokenStream, start: int) -> Tokens:
        """The s + 1 tokens from `start`, wrapping around the end."""
        length = self.seq_length + 1
        head = stream.tokens(start, length)
        if len(head) == length:
            return head
        return np.concatenate([head, stream.tokens(0, length - len(head))])


def permuted(index: int, size: int, key: int) -> int:
    """The image of `index` under the permutation of 0..size-1 that `key` selects; O(1) time and memory.

    An eight-round Feistel network on pairs (left, right) modulo (rows, columns), applied again until the result is
    below `size` (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), rarely twice.
    """
    columns = isqrt(size - 1) + 1
    rows = -(-size // columns)
    while True:
        left, right = divmod(index, columns)
        for turn in range(4):
            left = (left + _mixed(key, 2 * turn, right)) % rows
            right = (right + _mixed(key, 2 * turn + 1, left)) % columns
        index = left * columns + right
        if index < size:
            return index


def derived_key(*parts: object) -> int:
    """64 bits that depend on all of `parts`, the same on every machine."""
    return seed_from(repr(parts))


def _mixed(key: int, turn: int, value: int) -> int:
    """A 64-bit hash of three numbers (the finalizer of splitmix64: Steele, Lea and Flood, 2014)."""
    bits = (key + (turn + 1) * 0x9E3779B97F4A7C15 + value * 0xD1342543DE82EF95) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)
