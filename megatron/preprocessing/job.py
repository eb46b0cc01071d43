"""What there is to make of texts, what makes ids of them, and what is counted on the way. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy.typing as npt

from megatron.arrays import Ids
from megatron.data.indexed import best_dtype
from megatron.preprocessing.chunks import CHUNK_BYTES
from megatron.preprocessing.record_formats import Chat, PromptAndCompletion
from megatron.preprocessing.sources import Shard

TEXT, LABEL = "text", "label"  # the pairs of instruction data
LISTED_BAD_LINES = 10
COUNTS = (
    "documents", "tokens", "text_bytes", "empty", "filtered", "duplicates", "repaired", "contain_eod", "bad_lines",
    "by_reference", "learned", "without_answer",
)  # fmt: skip


class Encoded(Protocol):
    """What an encoder makes of texts: see `megatron.preprocessing.fast_encoding.checked.Encoded`."""

    ids: Ids
    sizes: Ids
    alarm: tuple[tuple[int, int], ...]
    first_seen: list[int]
    by_reference: int


class Encoder(Protocol):
    """The part of `CheckedEncoder` that is needed here."""

    vocab_size: int
    end_of_document: int
    affixes: tuple[tuple[int, ...], tuple[int, ...]]
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of texts without surrogates, with the affixes."""

    def encode_parts(self, documents: Sequence[Sequence[str]]) -> Encoded:
        """Ids of the parts of documents, without the affixes; sizes: of all parts."""


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
class Texts:
    """Texts that are documents as they stand; those under each key are a pair of files of their own.

    append_eod: end each document with the end-of-document token. ftfy: mend broken Unicode first.
    min_chars, max_chars: texts with fewer or more characters are left out. deduplicate: so is all but the first of
    equal texts.
    """

    append_eod: bool = False
    ftfy: bool = False
    min_chars: int = 0
    max_chars: int | None = None
    deduplicate: bool = False


@dataclass(frozen=True)
class Job:
    """What to make.

    keys: of the JSON objects, which the form reads. form: what becomes of them: texts, each key's as a pair
    `<output_prefix>_<key>_document`, or of a whole record text and labels, two pairs that belong together.
    skip_bad_lines: leave out a line that is not a JSON object with these keys, which else ends the work.
    shard: the share of the inputs to do. workers: threads or processes that tokenize; with 1 it happens in between
    reading and writing, on the threads of the tokenizer's library. checkpoint_seconds: what an interruption may cost.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    keys: tuple[str, ...] = ("text",)
    form: Texts | PromptAndCompletion | Chat = Texts()
    skip_bad_lines: bool = False
    shard: Shard | None = None
    workers: int = 1
    chunk_bytes: int = CHUNK_BYTES
    checkpoint_seconds: float = 10.0

    @property
    def pairs(self) -> tuple[str, ...]:
        """The names of the pairs of files that are written."""
        return self.keys if isinstance(self.form, Texts) else (TEXT, LABEL)

    def prefix(self, pair: str) -> str:
        """The prefix of the pair of this name."""
        return f"{self.output_prefix}_{pair}_document"

    @property
    def outputs(self) -> list[str]:
        """The files of all pairs."""
        return [self.prefix(pair) + ending for pair in self.pairs for ending in (".bin", ".idx")]

    def dtype(self, pair: str, vocab_size: int) -> npt.DTypeLike:
        """Of the ids in a pair; labels need a sign."""
        return best_dtype(vocab_size) if isinstance(self.form, Texts) or pair == TEXT else "<i4"

    def settings(self) -> dict[str, Any]:
        """What the output depends on besides inputs and tokenizer."""
        shard = asdict(self.shard) if self.shard else None
        return {"keys": list(self.keys), "form": asdict(self.form), "shard": shard}


@dataclass
class Totals:
    """What was done so far, all keys together. `bad_line_list` holds the first few of the `bad_lines`.

    filtered: documents left out for their length. repaired: those in which U+FFFD took the place of invalid text.
    contain_eod: those whose own text spells the end-of-document token. by_reference: those, or pieces of long ones,
    that the tokenizer's own library encoded. learned: tokens, of instruction data; without_answer: their records that
    were left out. input_bytes: read of the files on the disk.
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
    learned: int = 0
    without_answer: int = 0
    bad_line_list: list[str] = field(default_factory=list)
    input_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: "Totals") -> None:
        """Count what `other` counted, but for input_bytes and seconds, which are no sums."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad_line_list = (self.bad_line_list + other.bad_line_list)[:LISTED_BAD_LINES]

    def notes(self) -> list[str]:
        """Everything that did not go the plain way, with its count."""
        notes = {
            "empty documents left out": self.empty,
            "documents left out for their length": self.filtered,
            "records without an answer left out": self.without_answer,
            "duplicates left out": self.duplicates,
            "documents in which U+FFFD stands for invalid text": self.repaired,
            "documents that spell the end-of-document token in their own text": self.contain_eod,
            "bad lines left out, the first of them:": self.bad_lines,
        }
        return [f"{count:,} {note}" for note, count in notes.items() if count]


@dataclass
class EncodedChunk:
    """A chunk's documents: by pair the ids of all of them, one after another, the size of each, and hashes if wanted.

    alarm, first_seen: see `Encoded`.
    """

    totals: Totals
    ids: dict[str, Ids] = field(default_factory=dict)
    sizes: dict[str, Ids] = field(default_factory=dict)
    hashes: dict[str, list[bytes]] = field(default_factory=dict)
    alarm: tuple[tuple[int, int], ...] = ()
    first_seen: list[int] = field(default_factory=list)
