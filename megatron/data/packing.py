"""Samples of whole documents: `pack_impl: pack_until_overflow` and `unpacked`.

pack_until_overflow packs documents into a sample, in the order of the file, until the next one does not fit; unpacked
puts one document into each. The rest of the s + 1 positions is padded with loss-masked tokens. A document of more than
s + 1 tokens is truncated, or left out. The documents of a sample never change; each epoch of the training permutes the
samples with a key of its own.

Unlike windows this needs the sizes of all documents: about 16 bytes each, and a second for ten million.
Letters: s sequence length. No torch.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron.data.indexed import IndexedDataset
from megatron.data.windows import NOT_A_LABEL, Tokens, checked_ids, derived_key, permuted
from megatron.errors import UserError
from megatron.progress import Progress

PADDING = 0  # any id: it is loss-masked, and no earlier token attends to it


@dataclass(frozen=True)
class DocumentSamples:
    """Samples [2, s + 1], tokens and labels, of whole documents (a `SampleSource`).

    first, last: the range of documents. several: pack as many into a sample as fit. shuffle: for training; otherwise
    the samples are in order. labels: a dataset of the same sizes. There may be no sample at all.
    """

    dataset: IndexedDataset
    first: int
    last: int
    seq_length: int
    seed: int
    vocab_size: int
    several: bool
    allow_chopped: bool = True
    shuffle: bool = True
    labels: IndexedDataset | None = None
    documents: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)  # numbers of the documents in use
    bounds: npt.NDArray[np.int64] = field(init=False, repr=False, compare=False)  # sample i: documents[b[i]:b[i + 1]]

    def __post_init__(self) -> None:
        with Progress(f"laying out the documents of {self.dataset.prefix}"):
            self._lay_out()

    def _lay_out(self) -> None:
        sizes = self.dataset.sizes[self.first : self.last]
        expected = self.dataset.token_start(self.last) - self.dataset.token_start(self.first)
        if sizes.min(initial=0) < 0 or sizes.sum(dtype=np.int64) != expected:
            raise UserError(f"{self.dataset.prefix}.idx is damaged: its sizes do not add up; preprocess the data again")
        longest = sizes.max(initial=0) if self.allow_chopped else self.seq_length + 1
        # a sample of a single token would have no label
        used = np.flatnonzero((sizes >= (1 if self.several else 2)) & (sizes <= longest))
        kept = np.minimum(sizes[used].astype(np.int64), self.seq_length + 1)
        object.__setattr__(self, "documents", used + self.first)
        object.__setattr__(self, "bounds", _bounds(kept, self.seq_length + 1 if self.several else 0))

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents in use, without truncated ones."""
        sizes = self.dataset.sizes[self.documents]
        return int(np.minimum(sizes, self.seq_length + 1).sum(dtype=np.int64))

    @property
    def samples_per_epoch(self) -> int:
        """Samples that contain every document once."""
        return len(self.bounds) - 1

    @property
    def num_chopped(self) -> int:
        """Number of truncated documents."""
        return int((self.dataset.sizes[self.documents] > self.seq_length + 1).sum())

    @property
    def num_left_out(self) -> int:
        """Number of documents that are not used: too long, or too short to have a label."""
        return self.last - self.first - len(self.documents)

    def __getitem__(self, sample: int) -> Tokens:
        """Sample number `sample` of the run, [2, s + 1]."""
        row = np.full((2, self.seq_length + 1), PADDING, dtype=np.int64)
        row[1] = NOT_A_LABEL
        position = 0
        for document in self.documents_of(sample):
            ids = self._read(self.dataset, document)
            stop = position + len(ids)
            row[0, position:stop] = ids
            row[1, position:stop] = ids if self.labels is None else self._read(self.labels, document)
            position = stop
        return row

    def documents_of(self, sample: int) -> list[int]:
        """The documents in sample number `sample` of the run."""
        epoch, number = divmod(sample, self.samples_per_epoch)
        if self.shuffle:
            number = permuted(number, self.samples_per_epoch, derived_key(self.seed, "order", epoch))
        numbers: list[int] = self.documents[self.bounds[number] : self.bounds[number + 1]].tolist()
        return numbers

    def length_of(self, sample: int) -> int:
        """Tokens of documents in sample number `sample`, without padding."""
        sizes = self.dataset.sizes[self.documents_of(sample)]
        return int(np.minimum(sizes, self.seq_length + 1).sum())

    def _read(self, dataset: IndexedDataset, document: int) -> Tokens:
        ids = dataset.get(document, 0, self.seq_length + 1)
        return checked_ids(ids, self.vocab_size, dataset.prefix, are_labels=dataset is self.labels)


def _bounds(sizes: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    """Sample i is documents [i] .. [i + 1] of these sizes: as many as fit into `room`; or one each, where room is 0."""
    if not room:
        return np.arange(len(sizes) + 1)
    ends = np.cumsum(sizes)
    # for each document, the first later one that does not fit into the same sample
    following = np.searchsorted(ends, ends - sizes + room, side="right").tolist()
    bounds = [0]
    while bounds[-1] < len(sizes):
        bounds.append(following[bounds[-1]])
    return np.array(bounds, dtype=np.int64)
