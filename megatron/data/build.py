"""Build the samples of train, valid and test from the settings of the data.

Either one corpus is divided by `split`, or each part has its own corpora, which are blended. An empty part is None,
with the reason. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal, get_args

from megatron.data.blend import Blend, whole_shares
from megatron.data.dataset_slices import DatasetSlice, PackImpl, Sampling, divide, whole_corpus
from megatron.data.indexed import IndexedDataset
from megatron.data.mock import BEST_LOSS, MockStream
from megatron.data.windows import JoinedStreams, SampleSource, TokenStream, Windows, derived_key
from megatron.errors import UserError

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = get_args(Part)
CHECKED_TOKENS = 1_000_000  # of each part, when a run starts
MOCK_TOKENS: Mapping[Part, int] = {"train": 2**40, "valid": 2**20, "test": 2**20}


@dataclass(frozen=True)
class Mixture:
    """The corpora of one part. labels, weights: one for each path. alpha: weight by documents ** alpha."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Corpus:
    """The samples of one corpus of a part. weight: its share of the part; the shares have the sum 1."""

    name: str
    weight: float
    source: SampleSource


@dataclass(frozen=True)
class Sources:
    """The data of a run. A part without a single sample is None; `reasons` says why.

    description: lines for the start of a run.
    """

    train: SampleSource | None
    valid: SampleSource | None
    test: SampleSource | None
    streams: Mapping[Part, TokenStream]  # parts with at least two tokens, even if shorter than a sample
    reasons: Mapping[Part, str]
    description: tuple[str, ...]
    corpora: Mapping[Part, tuple[Corpus, ...]] = field(default_factory=dict)  # of the parts that blend several

    def samples(self, part: Part) -> SampleSource:
        """The samples of a part. Raises UserError with the reason when there are none."""
        source: SampleSource | None = getattr(self, part)
        if source is None:
            raise UserError(f"there are no {part} samples: {self.reasons[part]}")
        return source

    def part(self, part: Part) -> TokenStream:
        """The tokens of a part in order, for perplexity. Raises UserError when there are none."""
        if part not in self.streams:
            raise UserError(f"there are no {part} tokens: {self.reasons[part]}")
        return self.streams[part]


def build_sources(
    *,
    data_path: str | None = None,
    data_impl: str = "mmap",
    split: str = "969, 30, 1",
    mixtures: Mapping[Part, Mixture] | None = None,
    seq_length: int,
    seed: int,
    vocab_size: int,
    pack_impl: PackImpl = "packed",
    allow_chopped: bool = True,
) -> Sources:
    """Open the data of a run and split them.

    split: weights of train, valid and test, such as "969, 30, 1", for `data_path`. mixtures: the corpora of each part,
    instead of both. vocab_size: of the tokenizer; data with other ids are refused. Training samples are shuffled by
    `seed`, the others are in order.
    Raises UserError for missing, damaged or foreign data.
    """
    sampling = Sampling(seq_length, seed, vocab_size, pack_impl, allow_chopped)
    if data_impl == "mock":
        head = f"data: mock (a Markov chain, best possible loss {BEST_LOSS:.3f})"
        return _collect(head, {part: _mock(part, sampling) for part in PARTS})
    if mixtures:
        parts = {part: _mixed(part, mixtures.get(part), sampling) for part in PARTS}
        return _collect(f"data: {sum(len(mixture.paths) for mixture in mixtures.values()):,} corpora", parts)
    if not data_path:
        raise UserError("data_path is not set: give the prefix of a .bin/.idx pair, or data_impl: mock")
    dataset = IndexedDataset(data_path)
    slices = zip(PARTS, divide(dataset, split), strict=True)
    return _collect(_describe(dataset), {part: _single(part, *slice_, sampling) for part, slice_ in slices})


@dataclass(frozen=True)
class _Part:
    """One part: its tokens and samples, or the reason why there are none; and lines that describe it."""

    stream: TokenStream | None = None
    source: SampleSource | None = None
    reason: str = ""
    lines: tuple[str, ...] = ()
    corpora: tuple[Corpus, ...] = ()


def _mock(part: Part, sampling: Sampling) -> _Part:
    stream = MockStream(part, MOCK_TOKENS[part], sampling.vocab_size, sampling.seed)
    source = Windows(stream, sampling.seq_length, sampling.seed, shuffle=part == "train")
    line = f"{part}: made up, {stream.num_tokens:,} tokens, {source.samples_per_epoch:,} samples an epoch"
    return _Part(stream, source, lines=(line,))


def _single(part: Part, slice_: DatasetSlice, reason: str, sampling: Sampling) -> _Part:
    """A part of one corpus."""
    if slice_.num_tokens < 2:
        return _Part(reason=reason)
    slice_.check(sampling.vocab_size, CHECKED_TOKENS)
    stream, source = slice_.stream(sampling.vocab_size), slice_.samples(sampling, shuffle=part == "train")
    if source is None:
        return _Part(stream, reason=_too_few(slice_, sampling))
    return _Part(stream, source, lines=(f"{part}: {slice_.describe(source)}",))


def _mixed(part: Part, mixture: Mixture | None, sampling: Sampling) -> _Part:
    """A part with its own corpora. Raises UserError for a corpus without a sample: its weight would be wrong."""
    if mixture is None:
        return _Part(reason=f"{part}_data_paths is not set")
    slices = _slices(mixture)
    if len(slices) == 1:
        found = _single(part, slices[0], f"{slices[0].dataset.prefix} holds no tokens", sampling)
        head = f"{part}: {slices[0].dataset.prefix}, "
        return replace(found, lines=tuple(head + line.removeprefix(f"{part}: ") for line in found.lines))
    for slice_ in slices:
        slice_.check(sampling.vocab_size, CHECKED_TOKENS // len(slices))
    sources = [_own_samples(part, number, slice_, sampling) for number, slice_ in enumerate(slices)]
    shares = whole_shares([slice_.weight for slice_ in slices])
    weights = [share / sum(shares) for share in shares]
    total = sum(slice_.weight for slice_ in slices)
    rounded = any(abs(slice_.weight / total - weight) > 1e-12 for slice_, weight in zip(slices, weights, strict=True))
    lines = [f"{part}: a blend of {len(slices)} corpora, exact every {sum(shares):,} samples"]
    lines[0] += ", with weights rounded to millionths:" if rounded else ":"
    lines += [
        f"  {weight:.4%} {slice_.dataset.prefix}: {slice_.describe(source)}"
        for slice_, source, weight in zip(slices, sources, weights, strict=True)
    ]
    corpora = tuple(map(Corpus, _unique_names(slices), weights, sources))
    stream = JoinedStreams(tuple(slice_.stream(sampling.vocab_size) for slice_ in slices))
    return _Part(stream, Blend(tuple(sources), shares), lines=tuple(lines), corpora=corpora)


def _slices(mixture: Mixture) -> list[DatasetSlice]:
    """The corpora of a part, with their weights."""
    count = len(mixture.paths)
    rows = zip(mixture.paths, mixture.labels or [None] * count, mixture.weights or [1.0] * count, strict=True)
    slices = [whole_corpus(path, label, weight) for path, label, weight in rows]
    if mixture.alpha is None:
        return slices
    return [replace(slice_, weight=_weight(slice_.dataset, mixture.alpha)) for slice_ in slices]


def _weight(dataset: IndexedDataset, alpha: float) -> float:
    """The weight documents ** alpha. Raises UserError where that is not a positive number that a float can hold."""
    documents = max(1, len(dataset))  # an empty corpus is refused for its lack of samples
    try:
        weight: float = float(documents) ** alpha
    except OverflowError:
        weight = inf
    if not 0 < weight < inf:
        raise UserError(
            f"weighted_sampler_alpha ({alpha}) is out of range: the weight of {dataset.prefix} would be "
            f"{documents:,} ** {alpha} = {weight}; usual values are 0 (all corpora alike) to 1 (by size)"
        )
    return weight


def _own_samples(part: Part, number: int, slice_: DatasetSlice, sampling: Sampling) -> SampleSource:
    """The samples of one corpus of a blend, shuffled with a seed of its own."""
    own = replace(sampling, seed=derived_key(sampling.seed, "corpus", number))
    source = slice_.samples(own, shuffle=part == "train") if slice_.num_tokens > 1 else None
    if source is None:
        raise UserError(f"{part}_data_paths: {slice_.dataset.prefix} has no sample: {_too_few(slice_, sampling)}")
    return source


def _too_few(slice_: DatasetSlice, sampling: Sampling) -> str:
    if sampling.pack_impl == "packed":
        return f"its {slice_.num_tokens:,} tokens are too few for seq_length ({sampling.seq_length:,})"
    return f"none of its documents fits into seq_length ({sampling.seq_length:,}) with a label"


def _unique_names(slices: Sequence[DatasetSlice]) -> list[str]:
    """Names of the corpora; equal names are numbered."""
    names = [slice_.name for slice_ in slices]
    return [name if names.count(name) == 1 else f"{name}#{number}" for number, name in enumerate(names, start=1)]


def _collect(head: str, parts: Mapping[Part, _Part]) -> Sources:
    lines = [head]
    for name, part in parts.items():
        lines += part.lines if part.source is not None else (f"{name}: none, {part.reason}",)
    return Sources(
        parts["train"].source,
        parts["valid"].source,
        parts["test"].source,
        {name: part.stream for name, part in parts.items() if part.stream is not None},
        {name: part.reason for name, part in parts.items() if part.source is None},
        tuple(lines),
        {name: part.corpora for name, part in parts.items() if part.corpora},
    )


def _describe(dataset: IndexedDataset) -> str:
    line = f"data: {dataset.prefix}, {len(dataset):,} documents, {dataset.num_tokens:,} tokens ({dataset.dtype.name})"
    return line + (", split by token because it is one document" if len(dataset) == 1 else "")
