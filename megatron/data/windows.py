"""Which tokens sample i of a run holds: a pure function of (seed, tokens, i), with no index and no memory.

The tokens of one part of a corpus (train, valid or test) form a ring of T tokens. An epoch rotates the ring by an
offset of its own and cuts it into n = (T - 1) // s windows of s + 1 tokens, each sharing one token with the next, so
that every token is a label exactly once, but for the first one and a tail of fewer than s. A keyed permutation says in
which order the windows are visited. The number of steps, the batch size and the layout never enter.

Letters: T tokens of the part, s sequence length, n samples per epoch. No torch.
"""

import hashlib
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.indexed import Ids, IndexedDataset
from megatron.errors import UserError

Tokens = npt.NDArray[np.int64]  # [length]; a sample with labels of its own is [2, length]
NOT_A_LABEL = -100  # in the place of a label that nothing is to be learned from
_MASK = (1 << 64) - 1


class TokenStream(Protocol):
    """Tokens in a fixed order, read anywhere at the same cost."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""

    def tokens(self, start: int, length: int) -> Tokens:
        """Tokens `start` .. `start + length`, fewer at the end of the stream."""


class SampleSource(Protocol):
    """Samples of s + 1 tokens, as many as are asked for. Can be pickled, for the workers of a loader."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples after which every token has been seen."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream the samples are cut from."""

    def __getitem__(self, sample: int) -> Tokens:
        """Sample number `sample` >= 0 of the run; epoch `sample // samples_per_epoch`.

        Tokens [s + 1], whose labels are themselves; or [2, s + 1], tokens and the label of each (or `NOT_A_LABEL`).
        """


@dataclass(frozen=True)
class CorpusStream:
    """Tokens `start` .. `start + num_tokens` of an indexed dataset, each checked to be an id below `vocab_size`.

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
    """Several streams, one after the other (a `TokenStream`)."""

    streams: tuple[TokenStream, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all streams."""
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

    shuffle: rotate and permute anew each epoch, for training; else the windows come in order, from the first token.
    labels: as long as the stream, for samples with labels of their own. The stream must hold at least one window.
    """

    stream: TokenStream
    seq_length: int
    seed: int
    shuffle: bool = True
    labels: TokenStream | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream."""
        return self.stream.num_tokens

    @property
    def samples_per_epoch(self) -> int:
        """Whole windows in the stream, the same in every epoch."""
        return (self.num_tokens - 1) // self.seq_length

    def __getitem__(self, sample: int) -> Tokens:
        """Sample number `sample` of the run, [s + 1], or [2, s + 1] with labels."""
        start = self.start_of(sample)
        ids = self._around(self.stream, start)
        return ids if self.labels is None else np.stack([ids, self._around(self.labels, start)])

    def start_of(self, sample: int) -> int:
        """Where in the stream sample number `sample` begins; it may run past the end, on to the beginning."""
        epoch, position = divmod(sample, self.samples_per_epoch)
        if not self.shuffle:
            return position * self.seq_length
        window = permuted(position, self.samples_per_epoch, derived_key(self.seed, "order", epoch))
        offset = derived_key(self.seed, "offset", epoch) % self.num_tokens
        return (offset + window * self.seq_length) % self.num_tokens

    def _around(self, stream: TokenStream, start: int) -> Tokens:
        """S + 1 tokens from `start` on, past the end on to the beginning."""
        length = self.seq_length + 1
        head = stream.tokens(start, length)
        if len(head) == length:
            return head
        return np.concatenate([head, stream.tokens(0, length - len(head))])


def permuted(index: int, size: int, key: int) -> int:
    """Where `index` goes under the permutation of 0..size-1 that `key` chooses; O(1) time and memory.

    An eight-round Feistel network on pairs (left, right) modulo (rows, columns), walked on until it falls below `size`
    (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), seldom more than once.
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
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mixed(key: int, turn: int, value: int) -> int:
    """Sixty-four mixed bits of the three numbers (the finaliser of splitmix64: Steele, Lea and Flood, 2014)."""
    bits = (key + (turn + 1) * 0x9E3779B97F4A7C15 + value * 0xD1342543DE82EF95) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)
