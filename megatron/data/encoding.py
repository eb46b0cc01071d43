"""What happens to one chunk of text in a worker: parse, clean, tokenize. Floor 2; no torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from threading import local
from typing import Any, Protocol

import numpy as np

from megatron.arrays import Ids, surrounded
from megatron.data.documents import parse_chunk
from megatron.data.duplicates import text_hash
from megatron.data.indexed import best_dtype
from megatron.data.inputs import Shard
from megatron.data.reading import CHUNK_BYTES, Chunk
from megatron.text import utf8_length

LISTED_BAD_LINES = 10
COUNTS = (
    "documents", "tokens", "text_bytes", "empty", "filtered", "duplicates", "repaired", "contain_eod", "bad_lines",
    "by_reference",
)  # fmt: skip


class Encoded(Protocol):
    """What an encoder makes of texts: see `megatron.tokenizer.checked.Encoded`."""

    ids: Ids
    sizes: Ids
    alarm: tuple[tuple[int, int], ...]
    first_seen: list[int]
    by_reference: int


class Encoder(Protocol):
    """The part of `CheckedEncoder` that is needed here."""

    vocab_size: int
    end_of_document: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of texts without surrogates."""


class MakesEncoder(Protocol):
    """Settings of an encoder (`EncoderSettings`), to be pickled; copies are equal.

    in_threads: the encoder leaves Python's lock to others while it works, so that threads are as good as processes.
    """

    @property
    def in_threads(self) -> bool:
        """See above."""

    def __hash__(self) -> int:
        """The same for equal settings."""

    def __call__(self) -> Encoder:
        """The encoder."""

    def widened(self, found: tuple[tuple[int, int], ...]) -> "MakesEncoder":
        """Settings that leave more code points to the reference."""

    def describe(self) -> str:
        """One line."""


@dataclass(frozen=True)
class Job:
    """What to make.

    keys: of the JSON objects; the texts under each become a pair `<output_prefix>_<key>_document` of their own.
    append_eod: end each document with the end-of-document token. ftfy: mend broken Unicode first.
    min_chars, max_chars: texts with fewer or more characters are left out. deduplicate: so is all but the first of
    equal texts. skip_bad_lines: leave out a line that is not a JSON object with these keys, which else ends the work.
    shard: the share of the inputs to do. workers: threads or processes that tokenize; with 1 it happens in between
    reading and writing, on the threads of the tokenizer's library. checkpoint_seconds: what an interruption may cost.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    ftfy: bool = False
    min_chars: int = 0
    max_chars: int | None = None
    deduplicate: bool = False
    skip_bad_lines: bool = False
    shard: Shard | None = None
    workers: int = 1
    chunk_bytes: int = CHUNK_BYTES
    checkpoint_seconds: float = 10.0

    def prefix(self, key: str) -> str:
        """The prefix of the pair that holds the texts under `key`."""
        return f"{self.output_prefix}_{key}_document"

    def settings(self) -> dict[str, Any]:
        """What the output depends on besides inputs and tokenizer."""
        names = ("keys", "append_eod", "ftfy", "min_chars", "max_chars", "deduplicate")
        settings = {name: getattr(self, name) for name in names}
        return settings | {"keys": list(self.keys), "shard": asdict(self.shard) if self.shard else None}


@dataclass
class Totals:
    """What was done so far, all keys together. `bad_line_list` holds the first few of the `bad_lines`.

    filtered: documents left out for their length. repaired: those in which U+FFFD took the place of invalid text.
    contain_eod: those whose own text spells the end-of-document token. by_reference: those, or pieces of long ones,
    that the tokenizer's own library encoded. input_bytes: read of the files on the disk.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    filtered: int = 0
    duplicates: int = 0
    repaired: int = 0
    contain_eod: int = 0
    bad_lines: int = 0
    by_reference: int = 0
    bad_line_list: list[str] = field(default_factory=list)
    input_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: "Totals") -> None:
        """Count what `other` counted, but for input_bytes and seconds, which are no sums."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad_line_list = (self.bad_line_list + other.bad_line_list)[:LISTED_BAD_LINES]


@dataclass
class EncodedChunk:
    """A chunk's documents: by key the ids of all of them, one after another, the size of each, and hashes if wanted.

    alarm, first_seen: see `Encoded`.
    """

    totals: Totals
    ids: dict[str, Ids] = field(default_factory=dict)
    sizes: dict[str, Ids] = field(default_factory=dict)
    hashes: dict[str, list[bytes]] = field(default_factory=dict)
    alarm: tuple[tuple[int, int], ...] = ()
    first_seen: list[int] = field(default_factory=list)


def encode_chunk(chunk: Chunk, job: Job, make_encoder: MakesEncoder) -> EncodedChunk:
    """Parse and tokenize one chunk."""
    encoder = encoder_of(make_encoder)
    parsed = parse_chunk(chunk, job.keys)
    chunk.release()  # the one who handed it over holds it still
    result = EncodedChunk(Totals(repaired=parsed.repaired, bad_lines=len(parsed.bad_lines)))
    result.totals.bad_line_list = parsed.bad_lines[:LISTED_BAD_LINES]
    for key, texts in parsed.texts.items():
        _encode_texts(key, _chosen(texts, job, result.totals), job, encoder, result)
    return result


_made = local()


def encoder_of(make_encoder: MakesEncoder) -> Encoder:
    """One encoder for all chunks of a thread: it remembers what it has seen, and each chunk has to say that."""
    if getattr(_made, "by", None) != make_encoder:
        _made.encoder, _made.by = make_encoder(), make_encoder
    encoder: Encoder = _made.encoder
    return encoder


def _chosen(texts: list[str], job: Job, totals: Totals) -> list[str]:
    """The texts that are neither empty nor of a length that is not wanted, mended."""
    if job.ftfy:
        import ftfy  # only those who ask for it wait for it

        texts = [ftfy.fix_text(text) for text in texts]
    present = [text for text in texts if text]
    chosen = [
        text for text in present if job.min_chars <= len(text) and (job.max_chars is None or len(text) <= job.max_chars)
    ]
    totals.empty += len(texts) - len(present)
    totals.filtered += len(present) - len(chosen)
    return chosen


def _encode_texts(key: str, texts: list[str], job: Job, encoder: Encoder, result: EncodedChunk) -> None:
    encoded, totals = encoder.encode(texts), result.totals
    ids, sizes = encoded.ids, encoded.sizes
    if not sizes.all():  # a tokenizer that strips spaces has no ids for them
        texts = [text for text, size in zip(texts, sizes, strict=True) if size]
        totals.empty += len(sizes) - len(texts)
        sizes = sizes[sizes > 0]
    places = np.flatnonzero(ids == encoder.end_of_document)
    totals.contain_eod += len(np.unique(np.searchsorted(np.cumsum(sizes), places, "right")))
    if job.append_eod:
        ids, sizes = surrounded(ids, sizes, (), (encoder.end_of_document,)), sizes + 1
    totals.documents += len(sizes)
    totals.tokens += len(ids)
    totals.text_bytes += sum(map(utf8_length, texts))
    totals.by_reference += encoded.by_reference
    result.ids[key] = ids.astype(best_dtype(encoder.vocab_size), copy=False)
    result.sizes[key] = sizes.astype("<i4")
    result.hashes[key] = [text_hash(text) for text in texts] if job.deduplicate else []
    result.alarm += encoded.alarm
    result.first_seen += encoded.first_seen
