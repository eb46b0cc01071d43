"""The slice of a corpus that belongs to one part (train, valid or test), and its samples.

A corpus is split by document: contiguous ranges of documents, in the proportion of the weights and rounded as GPT-NeoX
rounds them. A corpus of a single document is split by token. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from megatron.data.indexed import DEFAULT_KEY_SUFFIX, IndexedDataset
from megatron.data.packing import DocumentSamples
from megatron.data.windows import CorpusStream, SampleSource, TokenStream, Windows
from megatron.errors import UserError

PackImpl = Literal["packed", "pack_until_overflow", "unpacked"]


@dataclass(frozen=True)
class Sampling:
    """How tokens become samples. allow_chopped: cut documents that are too long, unless pack_impl is packed."""

    seq_length: int
    seed: int
    vocab_size: int
    pack_impl: PackImpl = "packed"
    allow_chopped: bool = True


@dataclass(frozen=True)
class DatasetSlice:
    """Sequences `first` .. `last` of a dataset; or the range `tokens` of its tokens, where given.

    labels: a dataset with a label for every token. weight: in a blend, in any unit.
    """

    dataset: IndexedDataset
    first: int
    last: int
    tokens: tuple[int, int] | None = None
    labels: IndexedDataset | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        return Path(self.dataset.prefix).name.removesuffix(DEFAULT_KEY_SUFFIX)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        start, stop = self._range()
        return stop - start

    def stream(self, vocab_size: int) -> TokenStream:
        """The tokens in order."""
        return CorpusStream(self.dataset, self._range()[0], self.num_tokens, vocab_size)

    def check(self, vocab_size: int, tokens: int) -> None:
        """Check the first `tokens` tokens. Raises UserError for data of another tokenizer."""
        self.stream(vocab_size).tokens(0, tokens)

    def samples(self, sampling: Sampling, shuffle: bool) -> SampleSource | None:
        """The samples, or None if there is not even one. Raises UserError where pack_impl needs several documents."""
        source = self._packed(sampling, shuffle) if sampling.pack_impl == "packed" else self._whole(sampling, shuffle)
        return source if source.samples_per_epoch > 0 else None

    def describe(self, source: SampleSource | None) -> str:
        """A line about `source`, made by `samples`: "documents 0 to 99, 1,000 tokens, 10 samples an epoch"."""
        unit, first, last = ("documents", self.first, self.last) if self.tokens is None else ("tokens", *self.tokens)
        words = [f"{unit} {first:,} to {last - 1:,}", f"{self.num_tokens:,} tokens"]
        if source is not None:
            words.append(f"{source.samples_per_epoch:,} samples an epoch")
        if isinstance(source, DocumentSamples):
            words.append(f"{source.num_chopped:,} documents cut, {source.num_left_out:,} left out")
        return ", ".join(words)

    def _packed(self, sampling: Sampling, shuffle: bool) -> SampleSource:
        labels = None
        if self.labels is not None:
            labels = CorpusStream(self.labels, self._range()[0], self.num_tokens, sampling.vocab_size, are_labels=True)
        return Windows(self.stream(sampling.vocab_size), sampling.seq_length, sampling.seed, shuffle, labels)

    def _whole(self, sampling: Sampling, shuffle: bool) -> SampleSource:
        if self.tokens is not None:
            raise UserError(
                f"pack_impl ({sampling.pack_impl}) keeps documents whole, but {self.dataset.prefix} is a single one, "
                "which split cuts; use pack_impl: packed"
            )
        return DocumentSamples(
            self.dataset, self.first, self.last, sampling.seq_length, sampling.seed, sampling.vocab_size,
            several=sampling.pack_impl == "pack_until_overflow", allow_chopped=sampling.allow_chopped,
            shuffle=shuffle, labels=self.labels,
        )  # fmt: skip

    def _range(self) -> tuple[int, int]:
        return self.tokens or (self.dataset.token_start(self.first), self.dataset.token_start(self.last))


def whole_corpus(prefix: str, label_prefix: str | None = None, weight: float = 1.0) -> DatasetSlice:
    """The whole corpus at `prefix`. Raises UserError where files are missing, damaged or do not belong together."""
    dataset, labels = IndexedDataset(prefix), None
    if label_prefix is not None:
        labels = IndexedDataset(label_prefix)
        if not np.array_equal(dataset.sizes, labels.sizes):
            raise UserError(
                f"the labels {labels.prefix} ({len(labels):,} documents, {labels.num_tokens:,} tokens) do not match "
                f"{dataset.prefix} ({len(dataset):,} documents, {dataset.num_tokens:,} tokens) document by document"
            )
    return DatasetSlice(dataset, 0, len(dataset), labels=labels, weight=weight)


def divide(dataset: IndexedDataset, split: str) -> list[tuple[DatasetSlice, str]]:
    """The slices of train, valid and test, each with the reason in case it is empty."""
    by_document = len(dataset) != 1
    unit, count = ("documents", len(dataset)) if by_document else ("tokens", dataset.num_tokens)
    slices = []
    for first, last in split_ranges(count, parse_split(split)):
        slice_ = (
            DatasetSlice(dataset, first, last) if by_document else DatasetSlice(dataset, 0, 1, tokens=(first, last))
        )
        slices.append((slice_, f'split "{split}" leaves it {last - first:,} of {count:,} {unit}'))
    return slices


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid and test, summing to 1, from weights separated by "," or "/"; missing ones are 0.

    Raises UserError for anything else.
    """
    try:
        weights = [float(word) for word in split.replace("/", ",").split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(f'split ("{split}") must be one to three weights, such as "969, 30, 1"')
    train, valid, test = (weight / sum(weights) for weight in [*weights, 0.0, 0.0][:3])
    return train, valid, test


def split_ranges(count: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Contiguous ranges of 0..count, one for each share, rounded as GPT-NeoX does."""
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share * count))
    excess = bounds[-1] - count
    bounds = [0] + [min(max(bound - excess, 0), count) for bound in bounds[1:]]
    return list(pairwise(bounds))
