"""The unfinished files of a run: a pair of token files for each key, and the hashes of texts. No torch."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, Self

from megatron.data.indexed import IndexedWriter
from megatron.preprocessing.deduplication import Duplicates
from megatron.preprocessing.job import EncodedChunk, Job, Texts, Totals
from megatron.preprocessing.journal import Checkpoint


class Output:
    """Writes the pairs of files of a run, one for each key, without duplicates."""

    def __init__(self, job: Job, vocab_size: int, begin: Checkpoint | None) -> None:
        self._job, self._begin = job, begin
        written = begin.outputs if begin else {}
        self._writers = {
            pair: IndexedWriter(job.prefix(pair), job.dtype(pair, vocab_size), written.get(pair)) for pair in job.pairs
        }
        self._duplicates: dict[str, Duplicates] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for writer in self._writers.values():
                stack.enter_context(writer)
            form = self._job.form
            for key in self._job.pairs if isinstance(form, Texts) and form.deduplicate else ():
                known = self._begin.hashes[key] if self._begin else None
                self._duplicates[key] = Duplicates(f"{self._job.prefix(key)}.hashes.partial", known)
                stack.callback(partial(self._close_duplicates, key))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _close_duplicates(self, key: str) -> None:
        self._duplicates[key].close(self._writers[key].keep)

    def add(self, chunk: EncodedChunk) -> None:
        """Write a chunk's documents without duplicates, which are subtracted from `chunk.totals`."""
        for key, writer in self._writers.items():
            ids, sizes = chunk.ids[key], chunk.sizes[key]
            if key in self._duplicates:
                first = self._duplicates[key].first_ones(chunk.hashes[key])
                ids, sizes = ids[first.repeat(sizes)], sizes[first]
                chunk.totals.duplicates += len(first) - len(sizes)
                chunk.totals.documents -= len(first) - len(sizes)
                chunk.totals.tokens -= len(chunk.ids[key]) - len(ids)
            writer.add_documents(ids, sizes)

    def checkpoint(
        self, position: Checkpoint, totals: Totals, digests: Sequence[str | None], first_seen: list[int]
    ) -> Checkpoint:
        """Flush everything to disk and return the checkpoint; from now on the files are kept, also after an error."""
        position.outputs = {key: writer.checkpoint() for key, writer in self._writers.items()}
        position.hashes = {key: duplicates.checkpoint() for key, duplicates in self._duplicates.items()}
        position.totals, position.first_seen = asdict(totals), first_seen
        position.digests = list(digests[: None if position.complete else position.span])
        for writer in self._writers.values():
            writer.keep = True
        return position
