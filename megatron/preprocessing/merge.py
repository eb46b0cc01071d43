"""Join pairs of token files into one, in order or shuffled by document, in constant memory. No torch."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron.data.indexed import Ids, IndexedDataset, IndexedWriter
from megatron.data.windows import derived_key, permuted
from megatron.errors import UserError
from megatron.files import refuse_overwriting

COPIED_BYTES = 8 << 20  # per read
SHUFFLED_TOKENS = 8 << 20  # per batch of documents


def open_parts(prefixes: Sequence[str]) -> list[IndexedDataset]:
    """Open the pairs to join. Raises UserError if one is missing or damaged, or if their dtypes differ."""
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    kinds = {part.dtype.name for part in parts}
    if len(kinds) > 1:
        listed = ", ".join(f"{part.prefix} ({part.dtype.name})" for part in parts)
        raise UserError(f"these have different dtypes, so they are not of one tokenizer: {listed}")
    return parts


def merge(parts: Sequence[IndexedDataset], prefix: str, progress: Callable[[int], None] = lambda tokens: None) -> None:
    """Write all documents of `parts`, one part after another, to the pair `prefix`.

    progress: called with the number of tokens written so far. Raises UserError if the pair is one of the parts.
    """
    _require_other_name(parts, prefix)
    written = 0
    with IndexedWriter(prefix, parts[0].dtype) as writer:
        for part in parts:
            for first, last in _batches(part.sizes, COPIED_BYTES // part.dtype.itemsize):
                start, stop = part.token_start(first), part.token_start(last)
                ids = _read(part, start, stop - start)
                writer.add_documents(ids, part.sizes[first:last])
                written += len(ids)
                progress(written)


def merge_shuffled(
    parts: Sequence[IndexedDataset], prefix: str, seed: int, progress: Callable[[int], None] = lambda tokens: None
) -> None:
    """Write all documents of `parts` to the pair `prefix`, in an order that depends on `seed` and their number only.

    The order is a keyed permutation, which needs no memory. Documents are written in batches; each is read in the order
    of the files and then permuted. progress, errors: as for `merge`.
    """
    _require_other_name(parts, prefix)
    firsts = np.cumsum([0, *(len(part) for part in parts)])
    total, key, written = int(firsts[-1]), derived_key("documents", seed), 0
    with IndexedWriter(prefix, parts[0].dtype) as writer:
        for numbers in _shuffled_batches(parts, firsts, total, key):
            documents: list[Ids] = [np.empty(0)] * len(numbers)
            for position in np.argsort(numbers):
                owner = int(np.searchsorted(firsts, numbers[position], "right")) - 1
                number = int(numbers[position] - firsts[owner])
                documents[position] = _read(
                    parts[owner], parts[owner].token_start(number), int(parts[owner].sizes[number])
                )
            writer.add_documents(np.concatenate(documents), [len(document) for document in documents])
            written += sum(map(len, documents))
            progress(written)


def _shuffled_batches(parts: Sequence[IndexedDataset], firsts: Ids, total: int, key: int) -> Iterator[list[int]]:
    """The numbers of the documents in their new order, in batches of about SHUFFLED_TOKENS tokens."""
    batch, tokens = list[int](), 0
    for position in range(total):
        number = permuted(position, total, key)
        owner = int(np.searchsorted(firsts, number, "right")) - 1
        batch.append(number)
        tokens += int(parts[owner].sizes[number - firsts[owner]])
        if tokens >= SHUFFLED_TOKENS or position == total - 1:
            yield batch
            batch, tokens = [], 0


def _batches(sizes: Ids, tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about `tokens` tokens, at least one document each."""
    first = 0
    while first < len(sizes):
        ends = np.cumsum(sizes[first : first + 65536], dtype=np.int64)
        last = first + max(1, int(np.searchsorted(ends, tokens, "right")))
        yield first, last
        first = last


def _read(part: IndexedDataset, start: int, count: int) -> Ids:
    """Read from the file: pages of a memory map would count as memory of this process."""
    with Path(f"{part.prefix}.bin").open("rb", buffering=0) as file:
        data = os.pread(file.fileno(), count * part.dtype.itemsize, start * part.dtype.itemsize)
        while len(data) < count * part.dtype.itemsize:  # one call reads 2 GiB at most
            missing = count * part.dtype.itemsize - len(data)
            data += os.pread(file.fileno(), missing, start * part.dtype.itemsize + len(data))
    return np.frombuffer(data, part.dtype)


def _require_other_name(parts: Sequence[IndexedDataset], prefix: str) -> None:
    endings = (".bin", ".idx")
    refuse_overwriting(
        {f"output {ending}": prefix + ending for ending in endings},
        {f"the {ending} of part {n}": part.prefix + ending for n, part in enumerate(parts, 1) for ending in endings},
    )
