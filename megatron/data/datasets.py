"""From the settings of the data to the samples of train, valid and test.

Either one corpus is divided by `split`, or each part names its corpora and blends them. A part that comes out empty is
absent, with its reason. No torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from megatron.data.blend import Blend, whole_shares
from megatron.data.dataset_slices import PackImpl, Piece, Sampling, divide, whole_corpus
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
    """The corpora of one part. labels, weights: one for each path. alpha: weigh by documents ** alpha."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None
    alpha: float | None = None


@dataclass(frozen=True)
class Corpus:
    """The samples of one corpus of a part, alone and in order. weight: its share of the part, all adding up to 1."""

    name: str
    weight: float
    source: SampleSource


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
    corpora: Mapping[Part, tuple[Corpus, ...]] = field(default_factory=dict)  # of the parts that blend several

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
    """Open the data of a run and divide them.

    split: weights of train, valid and test, such as "969, 30, 1", for `data_path`. mixtures: the corpora of each part,
    in place of both. vocab_size: ids of the tokenizer; data with others are refused. Training samples are shuffled by
    `seed`, the others come in order.
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
    pieces = zip(PARTS, divide(dataset, split), strict=True)
    return _collect(_describe(dataset), {part: _single(part, *piece, sampling) for part, piece in pieces})


@dataclass(frozen=True)
class _Part:
    """One part: its tokens and samples, or the reason why there are none; lines that describe it."""

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


def _single(part: Part, piece: Piece, reason: str, sampling: Sampling) -> _Part:
    """A part that is (a piece of) one corpus."""
    if piece.num_tokens < 2:
        return _Part(reason=reason)
    piece.check(sampling.vocab_size, CHECKED_TOKENS)
    stream, source = piece.stream(sampling.vocab_size), piece.samples(sampling, shuffle=part == "train")
    if source is None:
        return _Part(stream, reason=_too_few(piece, sampling))
    return _Part(stream, source, lines=(f"{part}: {piece.describe(source)}",))


def _mixed(part: Part, mixture: Mixture | None, sampling: Sampling) -> _Part:
    """A part that names its corpora. Raises UserError for one without a sample: its weight could not be kept."""
    if mixture is None:
        return _Part(reason=f"{part}_data_paths is not set")
    pieces = _pieces(mixture)
    if len(pieces) == 1:
        found = _single(part, pieces[0], f"{pieces[0].dataset.prefix} holds no tokens", sampling)
        head = f"{part}: {pieces[0].dataset.prefix}, "
        return replace(found, lines=tuple(head + line.removeprefix(f"{part}: ") for line in found.lines))
    for piece in pieces:
        piece.check(sampling.vocab_size, CHECKED_TOKENS // len(pieces))
    sources = [_own_samples(part, number, piece, sampling) for number, piece in enumerate(pieces)]
    shares = whole_shares([piece.weight for piece in pieces])
    weights = [share / sum(shares) for share in shares]
    total = sum(piece.weight for piece in pieces)
    rounded = any(abs(piece.weight / total - weight) > 1e-12 for piece, weight in zip(pieces, weights, strict=True))
    lines = [f"{part}: a blend of {len(pieces)} corpora, exact every {sum(shares):,} samples"]
    lines[0] += ", with weights rounded to millionths:" if rounded else ":"
    lines += [
        f"  {weight:.4%} {piece.dataset.prefix}: {piece.describe(source)}"
        for piece, source, weight in zip(pieces, sources, weights, strict=True)
    ]
    corpora = tuple(map(Corpus, _unlike(pieces), weights, sources))
    stream = JoinedStreams(tuple(piece.stream(sampling.vocab_size) for piece in pieces))
    return _Part(stream, Blend(tuple(sources), shares), lines=tuple(lines), corpora=corpora)


def _pieces(mixture: Mixture) -> list[Piece]:
    """The corpora of a part, with their weights."""
    count = len(mixture.paths)
    rows = zip(mixture.paths, mixture.labels or [None] * count, mixture.weights or [1.0] * count, strict=True)
    pieces = [whole_corpus(path, label, weight) for path, label, weight in rows]
    if mixture.alpha is None:
        return pieces
    return [replace(piece, weight=float(len(piece.dataset)) ** mixture.alpha) for piece in pieces]


def _own_samples(part: Part, number: int, piece: Piece, sampling: Sampling) -> SampleSource:
    """The samples of one corpus of a blend, in an order of its own."""
    own = replace(sampling, seed=derived_key(sampling.seed, "corpus", number))
    source = piece.samples(own, shuffle=part == "train") if piece.num_tokens > 1 else None
    if source is None:
        raise UserError(f"{part}_data_paths: {piece.dataset.prefix} has no sample: {_too_few(piece, sampling)}")
    return source


def _too_few(piece: Piece, sampling: Sampling) -> str:
    if sampling.pack_impl == "packed":
        return f"its {piece.num_tokens:,} tokens are too few for seq_length ({sampling.seq_length:,})"
    return f"none of its documents fits into seq_length ({sampling.seq_length:,}) with a label"


def _unlike(pieces: Sequence[Piece]) -> list[str]:
    """Names of the corpora, numbered where several have the same."""
    names = [piece.name for piece in pieces]
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
