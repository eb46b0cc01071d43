"""The settings of a preprocessing run, its counts, and the result of one chunk. No torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Texts:
    """Texts that are documents; the texts of each key go to a separate pair of files.

    append_eod: end each document with the end-of-document token. ftfy: repair broken Unicode first.
    min_chars, max_chars: leave out texts with fewer or more characters. deduplicate: keep the first of equal texts.
    """

    append_eod: bool = False
    ftfy: bool = False
    min_chars: int = 0
    max_chars: int | None = None
    deduplicate: bool = False


@dataclass(frozen=True)
class Job:
    """The settings of a preprocessing run.

    keys: of the JSON objects. form: what they become: texts, one pair `<output_prefix>_<key>_document` for each key; or
    a pair of texts and a pair of labels for each record. skip_bad_lines: leave out lines that are not JSON objects with
    these keys; otherwise the first one ends the run. shard: the part of the inputs to process. workers: threads or
    processes that tokenize; with 1 the main thread does, on the threads of the tokenizer's library.
    checkpoint_seconds: time between checkpoints.
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
        """Names of the pairs of files that are written."""
        return self.keys if isinstance(self.form, Texts) else (TEXT, LABEL)

    def prefix(self, pair: str) -> str:
        """The prefix of the pair of this name."""
        return f"{self.output_prefix}_{pair}_document"

    @property
    def outputs(self) -> list[str]:
        """The files of all pairs."""
        return [self.prefix(pair) + ending for pair in self.pairs for ending in (".bin", ".idx")]

    def dtype(self, pair: str, vocab_size: int) -> npt.DTypeLike:
        """The dtype of the ids in a pair; labels are signed."""
        return best_dtype(vocab_size) if isinstance(self.form, Texts) or pair == TEXT else "<i4"

    def settings(self) -> dict[str, Any]:
        """Everything that the output depends on besides inputs and tokenizer."""
        shard = asdict(self.shard) if self.shard else None
        form = asdict(self.form) if isinstance(self.form, Texts) else self.form.settings()
        return {"keys": list(self.keys), "form": form, "shard": shard}


@dataclass
class Totals:
    """Counts so far, all keys together. `bad_line_list` holds the first few of the `bad_lines`.

    filtered: documents left out for their length. repaired: documents in which U+FFFD replaced invalid text.
    contain_eod: documents whose own text contains the end-of-document token. by_reference: documents, or parts of long
    ones, that the tokenizer's own library encoded. learned: tokens with a label, in instruction data; without_answer:
    records left out because they have none. input_bytes: read from the files on disk.
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
        """Add the counts of `other`, except input_bytes and seconds, which are not sums."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad_line_list = (self.bad_line_list + other.bad_line_list)[:LISTED_BAD_LINES]

    def notes(self) -> list[str]:
        """Counts of what was repaired or left out, one line each."""
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
    """A chunk's documents: for each pair their concatenated ids, their sizes, and their hashes for deduplication.

    alarm, first_seen: see `fast_encoding.checked.Encoded`.
    """

    totals: Totals
    ids: dict[str, Ids] = field(default_factory=dict)
    sizes: dict[str, Ids] = field(default_factory=dict)
    hashes: dict[str, list[bytes]] = field(default_factory=dict)
    alarm: tuple[tuple[int, int], ...] = ()
    first_seen: list[int] = field(default_factory=list)
