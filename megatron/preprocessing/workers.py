"""Read chunks in order, encode them in threads or processes, and yield the results in the same order. No torch."""

import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from megatron.errors import RunError
from megatron.preprocessing.chunks import Chunk, Position, read_chunks
from megatron.preprocessing.encoding import encode_chunk
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.job import EncodedChunk, Job, Texts
from megatron.preprocessing.journal import Checkpoint
from megatron.preprocessing.sources import HUGGING_FACE, Span, input_size

LARGE_CHUNKS = 8  # a document of more than this many chunks is large


class Reader:
    """The chunks of all inputs after a checkpoint, each with the position of its end; and a hash of each input."""

    def __init__(self, job: Job, spans: Sequence[Span], begin: Checkpoint) -> None:
        self._job, self._spans, self._begin = job, spans, begin
        self.digests: list[str | None] = list(begin.digests[: begin.span])
        self._bytes_before = [0]
        for span in spans:
            stop = input_size(span.path) if span.stop is None else span.stop
            self._bytes_before.append(self._bytes_before[-1] + stop - span.start)
        self._bytes_read: dict[tuple[int, int], int] = {}

    def __iter__(self) -> Iterator[tuple[Checkpoint, Chunk]]:
        job, begin = self._job, self._begin
        for number, span in enumerate(self._spans[begin.span :], start=begin.span):
            position = Position(begin.offset, begin.line) if number == begin.span else None
            digest = None if span.path.startswith(HUGGING_FACE) else hashlib.sha256()
            for chunk in read_chunks(span, job.keys, position, job.chunk_bytes, digest):
                self._bytes_read[number, chunk.end.offset] = chunk.bytes_read - span.start
                yield Checkpoint(number, chunk.end.offset, chunk.end.line), chunk
            self.digests.append(digest.hexdigest() if digest else None)

    def done_bytes(self, position: Checkpoint) -> int:
        """Bytes of the files on disk up to a position that was yielded."""
        return self._bytes_before[position.span] + self._bytes_read.pop((position.span, position.offset), 0)


Pending = deque[tuple[Checkpoint, int, Future[EncodedChunk]]]  # position, size, result


def encoded_chunks(
    job: Job, reader: Reader, make_encoder: EncoderSettings
) -> Generator[tuple[Checkpoint, EncodedChunk]]:
    """Every chunk of `reader` encoded, with the position of its end. Raises RunError when a worker dies."""
    if job.workers <= 1:
        for position, chunk in reader:
            yield position, encode_chunk(chunk, job, make_encoder)
        return
    pool = _pool(job, make_encoder)
    pending: Pending = deque()
    try:
        for position, chunk in reader:
            with _interrupts_held():
                pending.append((position, chunk.size, pool.submit(encode_chunk, chunk, job, make_encoder)))
            del chunk
            while _is_full(pending, job):
                yield _first(pending)
        while pending:
            yield _first(pending)
    except BrokenProcessPool as error:
        raise RunError("a worker process died, perhaps because memory ran out; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _is_full(pending: Pending, job: Job) -> bool:
    """Whether to wait before reading more, which bounds memory to a few chunks or one large document."""
    sizes = [size for _, size, _ in pending]
    return sum(sizes) > 3 * job.workers * job.chunk_bytes or max(sizes, default=0) > LARGE_CHUNKS * job.chunk_bytes


def _first(pending: Pending) -> tuple[Checkpoint, EncodedChunk]:
    position, _, future = pending.popleft()
    return position, future.result()


def _pool(job: Job, make_encoder: EncoderSettings) -> Executor:
    """Threads for a fast backend, which avoids copies between processes; processes for others."""
    if make_encoder.in_threads and not (isinstance(job.form, Texts) and job.form.ftfy):
        return ThreadPoolExecutor(job.workers)
    # Spawned: forking a process that has threads, as the tokenizer's library does, can hang.
    return ProcessPoolExecutor(job.workers, multiprocessing.get_context("spawn"), initializer=_start_worker)


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT, also in processes started meanwhile, which leave its handling to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
