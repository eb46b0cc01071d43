"""Verify a pair of token files and show its content. No torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron.data.indexed import DEFAULT_KEY_SUFFIX, PIECE, Ids, IndexedDataset
from megatron.data.manifest import file_facts, read_manifest


class Tokenizer(Protocol):
    """The methods of a tokenizer that are used here."""

    vocab_size: int

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


def problems(dataset: IndexedDataset, tokenizer: Tokenizer | None = None) -> Iterator[str]:
    """All problems of a pair, which is read completely, block by block.

    Checked are the sizes and offsets in the index, the document index, that ids are within the tokenizer's vocabulary,
    and the hashes in the manifest next to the files, if there is one.
    """
    yield from _index_problems(dataset)
    if tokenizer is not None:
        yield from _id_problems(dataset, tokenizer)
    yield from _manifest_problems(dataset.prefix)


def describe(dataset: IndexedDataset, end_of_document: int | None) -> Iterator[str]:
    """Lines of statistics about a pair."""
    sizes = dataset.sizes
    if len(sizes):
        quarters = np.percentile(sizes, [0, 25, 50, 75, 100]).astype(int).tolist()
        yield f"tokens in a document: {' / '.join(f'{value:,}' for value in quarters)} (least, quartiles, most)"
    if end_of_document is not None:
        ends = _last_ids(dataset)
        yield f"documents that end with the end-of-document token: {int((ends == end_of_document).sum()):,}"


def show(dataset: IndexedDataset, number: int, tokenizer: Tokenizer, characters: int) -> Iterator[str]:
    """A decoded document; of a long one its beginning and end."""
    text = tokenizer.decode(dataset.get(number).tolist())
    yield f"--- document {number:,}: {int(dataset.sizes[number]):,} tokens, {len(text):,} characters"
    yield text if len(text) <= characters else f"{text[: characters // 2]}\n[...]\n{text[-characters // 2 :]}"


def _index_problems(dataset: IndexedDataset) -> Iterator[str]:
    documents = dataset.document_index
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(dataset):
        yield "the document index does not begin with 0 and end with the number of sequences"
    offset = 0
    for first in range(0, len(dataset), PIECE):
        sizes = dataset.sizes[first : first + PIECE].astype(np.int64)
        if (sizes <= 0).any():
            yield f"sequence {first + int(np.argmax(sizes <= 0)):,} has no tokens"
        starts = offset + np.cumsum(sizes) - sizes
        found = np.array([dataset.token_start(first), dataset.token_start(first + len(sizes) - 1)])
        if found.tolist() != [int(starts[0]), int(starts[-1])]:
            yield f"sequences {first:,} to {first + len(sizes) - 1:,} are not contiguous"
        offset = int(starts[-1] + sizes[-1])


def _id_problems(dataset: IndexedDataset, tokenizer: Tokenizer) -> Iterator[str]:
    for start in range(0, dataset.num_tokens, 1 << 22):
        ids = dataset.tokens(start, 1 << 22)
        if int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0:
            wrong = int(ids[(ids >= tokenizer.vocab_size) | (ids < 0)][0])
            yield f"the id {wrong:,} is not in the vocabulary (0 to {tokenizer.vocab_size - 1:,}): of another tokenizer"
            return


def _manifest_problems(prefix: str) -> Iterator[str]:
    manifest = read_manifest(prefix) or read_manifest(prefix.removesuffix(DEFAULT_KEY_SUFFIX))
    for noted in (manifest or {}).get("outputs", []):
        path = str(Path(prefix).parent / Path(noted["path"]).name)
        if path.rpartition(".")[0] == prefix and file_facts(path)["sha256"] != noted["sha256"]:
            yield f"{path} is not the file that the manifest describes: its SHA-256 differs"


def _last_ids(dataset: IndexedDataset) -> Ids:
    offsets = [dataset.token_start(number + 1) - 1 for number in range(len(dataset))]
    return np.array([int(dataset.tokens(offset, 1)[0]) for offset in offsets])
