"""Text files to token files: read, tokenize in worker processes, write in order.

The tokenizer arrives as a function that makes one, so that each worker can make its own. Floor 2; no torch.
"""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron.data.documents import Chunk, parse_chunk, read_chunks
from megatron.data.indexed import IndexedWriter, best_dtype
from megatron.errors import RunError

LISTED_BAD_LINES = 10


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    vocab_size: int
    end_of_document: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""


@dataclass(frozen=True)
class Job:
    """What to make.

    keys: of the JSON objects; the texts under each become a pair `<output_prefix>_<key>_document` of their own.
    append_eod: end each document with the end-of-document token. ftfy: mend broken Unicode first.
    skip_bad_lines: leave out a line that is not a JSON object with these keys; otherwise it ends the work.
    workers: processes that tokenize; with 1 it happens in this one, on the threads of the tokenizer's library.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    ftfy: bool = False
    skip_bad_lines: bool = False
    workers: int = 1

    def prefix(self, key: str) -> str:
        """The prefix of the pair that holds the texts under `key`."""
        return f"{self.output_prefix}_{key}_document"


@dataclass
class Totals:
    """What was done so far, all keys together. `bad_line_list` holds the first few of the `bad_lines`.

    repaired: documents in which U+FFFD took the place of invalid text. contain_eod: those whose own text spells the
    end-of-document token. input_bytes: read of the files on the disk.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty: int = 0
    repaired: int = 0
    contain_eod: int = 0
    bad_lines: int = 0
    bad_line_list: list[str] = field(default_factory=list)
    input_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: "Totals") -> None:
        """Count what `other` counted, but for input_bytes and seconds, which are no sums."""
        for name in ("documents", "tokens", "text_bytes", "empty", "repaired", "contain_eod", "bad_lines"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad_line_list = (self.bad_line_list + other.bad_line_list)[:LISTED_BAD_LINES]


@dataclass(frozen=True)
class EncodedChunk:
    """A chunk's documents: by key the ids of all of them, one after another, and the size of each."""

    ids: dict[str, npt.NDArray[Any]]
    sizes: dict[str, list[int]]
    totals: Totals


def preprocess(
    job: Job, make_encoder: Callable[[], Encoder], progress: Callable[[Totals], None] = lambda totals: None
) -> Totals:
    """Tokenize `job.inputs`, in their order; the files are the same for any number of workers.

    make_encoder: can be pickled, and its copies are equal (`TokenizerSettings`). progress: called after each chunk.
    Raises RunError for a bad line, a damaged file, a full disk or a lost worker; then no output is left behind.
    """
    started, totals = time.monotonic(), Totals()
    dtype = best_dtype(_encoder(make_encoder).vocab_size)
    with closing(_encoded_chunks(job, make_encoder)) as chunks, ExitStack() as stack:
        writers = {key: stack.enter_context(IndexedWriter(job.prefix(key), dtype)) for key in job.keys}
        for position, chunk in chunks:
            if chunk.totals.bad_lines and not job.skip_bad_lines:
                raise RunError(f"{chunk.totals.bad_line_list[0]} (--skip-bad-lines leaves such lines out)")
            for key, writer in writers.items():
                writer.add_documents(chunk.ids[key], chunk.sizes[key])
            totals.add(chunk.totals)
            totals.input_bytes, totals.seconds = position, time.monotonic() - started
            progress(totals)
        if not totals.documents:
            raise RunError(f"no document in {', '.join(job.inputs)} has any text under {', '.join(job.keys)}")
    return totals


def encode_chunk(chunk: Chunk, job: Job, make_encoder: Callable[[], Encoder]) -> EncodedChunk:
    """Parse and tokenize one chunk."""
    encoder = _encoder(make_encoder)
    parsed = parse_chunk(chunk, job.keys)
    totals = Totals(repaired=parsed.repaired, bad_lines=len(parsed.bad_lines))
    totals.bad_line_list = parsed.bad_lines[:LISTED_BAD_LINES]
    ids, sizes = {}, {}
    for key, texts in parsed.texts.items():
        documents = _encode(_mended(texts) if job.ftfy else texts, encoder, totals)
        if job.append_eod:
            documents = [[*document, encoder.end_of_document] for document in documents]
        sizes[key] = [len(document) for document in documents]
        count = sum(sizes[key])
        ids[key] = np.fromiter(chain.from_iterable(documents), best_dtype(encoder.vocab_size), count)
        totals.tokens += count
    return EncodedChunk(ids, sizes, totals)


def _encode(texts: list[str], encoder: Encoder, totals: Totals) -> list[list[int]]:
    """Ids of the texts that are not empty, counted."""
    encoded = encoder.encode_batch(texts)
    # An empty text may still get ids, from a tokenizer that marks the beginning of each.
    documents = [ids for text, ids in zip(texts, encoded, strict=True) if text and ids]
    totals.documents += len(documents)
    totals.empty += len(texts) - len(documents)
    totals.text_bytes += sum(len(text.encode()) for text in texts)
    totals.contain_eod += sum(encoder.end_of_document in ids for ids in documents)
    return documents


def _mended(texts: list[str]) -> list[str]:
    import ftfy  # only those who ask for it wait for it

    return [ftfy.fix_text(text) for text in texts]


def _positioned_chunks(inputs: Sequence[str]) -> Iterator[tuple[int, Chunk]]:
    """Each chunk with the bytes read so far of all files."""
    before = 0
    for path in inputs:
        for chunk in read_chunks(path):
            yield before + chunk.bytes_read, chunk
        before += Path(path).stat().st_size


def _encoded_chunks(job: Job, make_encoder: Callable[[], Encoder]) -> Generator[tuple[int, EncodedChunk]]:
    if job.workers <= 1:
        for position, chunk in _positioned_chunks(job.inputs):
            yield position, encode_chunk(chunk, job, make_encoder)
        return
    # Spawned: forking a process that has threads, as the tokenizer's library does, can hang.
    pool = ProcessPoolExecutor(job.workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    pending: deque[tuple[int, Future[EncodedChunk]]] = deque()
    try:
        for position, chunk in _positioned_chunks(job.inputs):
            with _interrupts_held():
                pending.append((position, pool.submit(encode_chunk, chunk, job, make_encoder)))
            if len(pending) > 3 * job.workers:  # the bound on memory
                yield _first(pending)
        while pending:
            yield _first(pending)
    except BrokenProcessPool as error:
        raise RunError("a worker process died, perhaps for want of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _first(pending: deque[tuple[int, Future[EncodedChunk]]]) -> tuple[int, EncodedChunk]:
    position, future = pending.popleft()
    return position, future.result()


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for a moment; processes started meanwhile never see it, and leave it to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@lru_cache(maxsize=1)
def _encoder(make_encoder: Callable[[], Encoder]) -> Encoder:
    """One tokenizer for all chunks of a process."""
    return make_encoder()
