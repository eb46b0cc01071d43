"""From the settings of the data to the samples of train, valid and test.

A corpus is split by document: contiguous ranges of documents, in the proportion of the weights and rounded as GPT-NeoX
rounds them. A corpus of a single document is split by token. A part that comes out empty is absent, with its reason.
Floor 2; no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from megatron.data.indexed import IndexedDataset
from megatron.data.mock import BEST_LOSS, MockStream
from megatron.data.windows import CorpusStream, SampleSource, TokenStream, Windows
from megatron.errors import UserError

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
CHECKED_TOKENS = 1_000_000
MOCK_TOKENS: Mapping[Part, int] = {"train": 2**40, "valid": 2**20, "test": 2**20}


@dataclass(frozen=True)
class Sources:
    """What a run reads. A part is None when it has not even one sample; `reasons` says why, for each such part.

    description: lines for the start of a run.
    """

    train: SampleSource | None
    valid: SampleSource | None
    test: SampleSource | None
    streams: Mapping[Part, TokenStream]  # parts with at least two tokens, even if shorter than a sample
    reasons: Mapping[Part, str]
    description: tuple[str, ...]

    def samples(self, part: Part) -> SampleSource:
        """The samples of a part that is needed. Raises UserError with the reason when there are none."""
        source: SampleSource | None = getattr(self, part)
        if source is None:
            raise UserError(f"there are no {part} samples: {self.reasons[part]}")
        return source

    def part(self, part: Part) -> TokenStream:
        """The tokens of a part in their order, for perplexity. Raises UserError when there are none."""
        if part not in self.streams:
            raise UserError(f"there are no {part} tokens: {self.reasons[part]}")
        return self.streams[part]


def build_sources(
    *, data_path: str | None, data_impl: str, split: str, seq_length: int, seed: int, vocab_size: int
) -> Sources:
    """Open the data of a run and divide them.

    split: weights of train, valid and test, such as "969, 30, 1". vocab_size: ids of the tokenizer; data with others
    are refused. Training samples are shuffled by `seed`, the others come in order.
    Raises UserError for missing, damaged or foreign data.
    """
    if data_impl == "mock":
        head = f"data: mock (a Markov chain, best possible loss {BEST_LOSS:.3f})"
        parts = {part: _Part(MockStream(part, n, vocab_size, seed), "made up") for part, n in MOCK_TOKENS.items()}
    elif not data_path:
        raise UserError("data_path is not set: give the prefix of a .bin/.idx pair, or data_impl: mock")
    else:
        dataset = IndexedDataset(data_path)
        head = _describe(dataset)
        parts = _divide(dataset, split, vocab_size)
    return _sources(head, parts, seq_length, seed)


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid and test, which add up to 1, from weights parted by "," or "/"; missing ones are 0.

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


@dataclass(frozen=True)
class _Part:
    """The tokens of one part, if there are at least two, and a note: where they lie, or why there are none."""

    stream: TokenStream | None
    note: str


def _divide(dataset: IndexedDataset, split: str, vocab_size: int) -> dict[Part, _Part]:
    by_document = len(dataset) != 1
    unit, count = ("documents", len(dataset)) if by_document else ("tokens", dataset.num_tokens)
    parts = {}
    for part, (first, last) in zip(PARTS, split_ranges(count, parse_split(split)), strict=True):
        start, stop = (dataset.token_start(n) if by_document else n for n in (first, last))
        stream = CorpusStream(dataset, start, stop - start, vocab_size)
        if stream.num_tokens < 2:
            parts[part] = _Part(None, f'split "{split}" leaves it {last - first:,} of {count:,} {unit}')
        else:
            stream.tokens(0, CHECKED_TOKENS)  # data of another tokenizer are refused before the work starts
            parts[part] = _Part(stream, f"{unit} {first:,} to {last - 1:,}")
    return parts


def _sources(head: str, parts: Mapping[Part, _Part], seq_length: int, seed: int) -> Sources:
    streams = {name: part.stream for name, part in parts.items() if part.stream is not None}
    samples = {
        name: Windows(stream, seq_length, seed, shuffle=name == "train")
        for name, stream in streams.items()
        if stream.num_tokens > seq_length
    }
    reasons, lines = {}, [head]
    for name, part in parts.items():
        if name in samples:
            tokens, count = streams[name].num_tokens, samples[name].samples_per_epoch
            lines.append(f"{name}: {part.note}, {tokens:,} tokens, {count:,} samples an epoch")
            continue
        reasons[name] = part.note
        if part.stream is not None:
            reasons[name] = f"its {part.stream.num_tokens:,} tokens are too few for seq_length ({seq_length:,})"
        lines.append(f"{name}: none, {reasons[name]}")
    return Sources(samples.get("train"), samples.get("valid"), samples.get("test"), streams, reasons, tuple(lines))


def _describe(dataset: IndexedDataset) -> str:
    line = f"data: {dataset.prefix}, {len(dataset):,} documents, {dataset.num_tokens:,} tokens ({dataset.dtype.name})"
    return line + (", split by token because it is one document" if len(dataset) == 1 else "")
