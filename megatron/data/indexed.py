r"""Token ids in two files, in the "mmap" format of GPT-NeoX and Megatron-LM, read without copying.

`<prefix>.bin` holds the ids of all sequences back to back. `<prefix>.idx`, little-endian, holds the offset of each:

    offset    bytes  content
    0         9      magic "MMIDIDX\0\0"
    9         8      uint64 version, 1
    17        1      uint8 code of the dtype, see DTYPES
    18        8      uint64 N, number of sequences
    26        8      uint64 D, length of the document index
    34        4N     int32 tokens in each sequence
    34+4N     8N     int64 offset of each sequence in the .bin, in bytes
    34+12N    8D     int64 document index: 0, then the number of sequences up to the end of each document
    34+12N+8D N      int8 mode of each sequence; only in multimodal datasets of Megatron-core, where 0 is text

Deepy writes one sequence for each document and, as GPT-NeoX does, reads every sequence as a document.
No torch.
"""

import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron.errors import RunError, UserError
from megatron.files import exists, is_file, is_folder
from megatron.registry import nearest
from megatron.text_files import SIGNATURE_BYTES, what_instead_of_text

Ids = npt.NDArray[Any]  # one axis of token ids, in the dtype of their file

MAGIC = b"MMIDIDX\x00\x00"
CACHED_MAGIC = b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats, which token ids are not
CHECKED_SEQUENCES = 64  # when a file is opened
PIECE = 1 << 18  # entries of an index per write
DEFAULT_KEY_SUFFIX = "_text_document"  # what preprocess_data.py adds to --output-prefix for the key "text"


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype in which ids 0..vocab_size-1 are stored: uint16 below 65,500 (GPT-NeoX's limit), else int32."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class IndexedDataset:
    """The sequences of one `.bin`/`.idx` pair, memory-mapped: opening costs the same at any size.

    prefix: path of the pair without its ending; the ending, or a missing `_text_document`, is accepted too.
    Raises UserError when a file is missing, is of another format, or when the two do not belong together.
    Unpickling a copy, as loader workers do, opens the files again.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = find_prefix(prefix)
        self._index = _map(f"{self.prefix}.idx", np.dtype("<u1"))
        code, count, documents = _read_header(f"{self.prefix}.idx", self._index)
        self.dtype = np.dtype(DTYPES[code])
        self.sizes: npt.NDArray[np.int32] = self._table("<i4", HEADER.size, count)
        self._pointers: npt.NDArray[np.int64] = self._table("<i8", HEADER.size + 4 * count, count)
        self.document_index: npt.NDArray[np.int64] = self._table("<i8", HEADER.size + 12 * count, documents)
        self.num_tokens = self._check_length()
        self._check_offsets()
        self._ids = _map(f"{self.prefix}.bin", self.dtype)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sizes)

    def get(self, sequence: int, offset: int = 0, length: int | None = None) -> Ids:
        """Ids `offset` .. `offset + length` (to the end, if None) of one sequence, as a read-only view of the file."""
        size = int(self.sizes[sequence])
        stop = size if length is None else min(offset + length, size)
        start = self.token_start(sequence)
        return self._ids[start + offset : start + stop]

    def token_start(self, sequence: int) -> int:
        """Tokens before `sequence` in the file; `token_start(len(self))` is the number of all tokens."""
        return self.num_tokens if sequence == len(self) else int(self._pointers[sequence]) // self.dtype.itemsize

    def tokens(self, start: int, length: int) -> Ids:
        """Ids `start` .. `start + length` of all sequences written one after another, as a view of the file."""
        return self._ids[start : start + length]

    def _table(self, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        return np.frombuffer(self._index, dtype=dtype, count=count, offset=offset)

    def _check_length(self) -> int:
        """Number of tokens; the end of the last sequence must be the end of the .bin."""
        path = f"{self.prefix}.bin"
        expected = 0
        if len(self.sizes):
            expected = int(self._pointers[-1]) + int(self.sizes[-1]) * self.dtype.itemsize
        found = Path(path).stat().st_size
        if found != expected:
            raise UserError(
                f"{path} has {found:,} bytes, but {self.prefix}.idx describes {expected:,}: "
                "the two files are not of one run, or one was cut short; preprocess the data again"
            )
        return expected // self.dtype.itemsize

    def _check_offsets(self) -> None:
        """Check that a few sequences are contiguous, at the same cost for any number of sequences."""
        if not len(self):
            return
        if first := int(self._pointers[0]):
            raise UserError(
                f"{self.prefix}.idx is damaged: sequence 0 begins at byte {first:,} and should at 0; "
                "preprocess the data again"
            )
        numbers = np.unique(np.linspace(0, len(self) - 1, CHECKED_SEQUENCES).astype(np.int64))
        following = np.minimum(numbers + 1, len(self) - 1)
        ends = self._pointers[numbers] + self.sizes[numbers].astype(np.int64) * self.dtype.itemsize
        wrong = (self.sizes[numbers] < 0) | ((ends != self._pointers[following]) & (following > numbers))
        if wrong.any():
            number = int(numbers[wrong.argmax()])
            raise UserError(
                f"{self.prefix}.idx is damaged: sequence {number:,} does not end where the next one begins; "
                "preprocess the data again"
            )


class IndexedWriter:
    """Writes one `.bin`/`.idx` pair, which appears under its final name when the `with` block ends without an error.

    prefix: path of the pair without its ending; its folder is created. dtype: of the ids in the file (`best_dtype`).
    resume_at: what `checkpoint` returned in an interrupted run; later data are truncated. keep: set it to keep the
    unfinished files for resuming, also after an error; otherwise they are deleted.
    Memory does not grow with the data. Raises RunError when the disk is full.
    """

    def __init__(self, prefix: str, dtype: npt.DTypeLike, resume_at: tuple[int, int] | None = None) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.keep = resume_at is not None
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == self.dtype)
        self._resume_at = resume_at

    def __enter__(self) -> Self:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        num_bytes, documents = self._resume_at or (0, 0)
        self._file = self._open(".bin.partial", num_bytes)
        self._sizes = self._open(".sizes.partial", 4 * documents)
        return self

    def add_document(self, ids: Sequence[int] | Ids) -> None:
        """Append one document. Raises ValueError for ids that the dtype cannot hold."""
        self.add_documents(ids, [len(ids)])

    def add_documents(self, ids: Sequence[int] | Ids, sizes: Sequence[int] | Ids) -> None:
        """Append several documents: their concatenated ids, and the number of tokens of each."""
        values = np.asarray(ids)
        limits = np.iinfo(self.dtype)
        if values.dtype != self.dtype and values.size and (values.min() < limits.min or values.max() > limits.max):
            raise ValueError(f"token ids from {values.min()} to {values.max()} do not fit into {self.dtype.name}")
        with _full_disk_named(self.prefix):
            self._file.write(values.astype(self.dtype, copy=False).data)
            self._sizes.write(np.asarray(sizes, "<i4").data)

    def checkpoint(self) -> tuple[int, int]:
        """Flush everything to disk. Returns the bytes and documents written, for `resume_at`."""
        with _full_disk_named(self.prefix):
            _flush_to_disk(self._file)
            _flush_to_disk(self._sizes)
        return self._file.tell(), self._sizes.tell() // 4

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _full_disk_named(self.prefix):
                if error is None and not self.keep:
                    self._finish()
        finally:
            for file in (self._file, self._sizes):
                with suppress(OSError):  # on a full disk the buffers cannot be flushed; the file is deleted
                    file.close()
            for ending in () if self.keep else (".bin.partial", ".sizes.partial", ".idx.partial"):
                Path(self.prefix + ending).unlink(missing_ok=True)

    def _open(self, ending: str, size: int) -> BinaryIO:
        if self._resume_at is None:
            return Path(self.prefix + ending).open("w+b")
        file = Path(self.prefix + ending).open("r+b")  # noqa: SIM115 (closed at the end of the block)
        file.truncate(size)
        file.seek(size)
        return file

    def _finish(self) -> None:
        _flush_to_disk(self._file)
        self._sizes.flush()
        with Path(f"{self.prefix}.idx.partial").open("wb") as index:
            _write_index(index, self._sizes, self._code, self.dtype.itemsize)
            _flush_to_disk(index)
        # The old index goes first: a reader never sees the new tokens with the old index.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        Path(f"{self.prefix}.bin.partial").replace(f"{self.prefix}.bin")
        Path(f"{self.prefix}.idx.partial").replace(f"{self.prefix}.idx")


def give_names(prefix: str, dtype: npt.DTypeLike, resume_at: tuple[int, int]) -> None:
    """Give a completely written pair its final names. After an interruption this can be repeated."""
    if Path(f"{prefix}.bin.partial").exists():
        with IndexedWriter(prefix, dtype, resume_at) as writer:
            writer.keep = False
    elif Path(f"{prefix}.idx.partial").exists():  # interrupted between the two renames
        Path(f"{prefix}.idx.partial").replace(f"{prefix}.idx")
    Path(f"{prefix}.sizes.partial").unlink(missing_ok=True)


def _write_index(index: BinaryIO, sizes: BinaryIO, code: int, itemsize: int) -> None:
    """Write an index from a file of sizes, block by block, in constant memory."""
    count = sizes.tell() // 4
    index.write(HEADER.pack(MAGIC, 1, code, count, count + 1))

    def pieces() -> Iterator[npt.NDArray[np.int32]]:
        sizes.seek(0)
        while data := sizes.read(4 * PIECE):
            yield np.frombuffer(data, "<i4")

    for piece in pieces():
        index.write(piece.data)
    start = 0
    for piece in pieces():
        ends = start + np.cumsum(piece, dtype="<i8") * itemsize
        index.write((ends - piece * np.int64(itemsize)).data)
        start = int(ends[-1])
    for first in range(0, count + 1, PIECE):
        index.write(np.arange(first, min(first + PIECE, count + 1), dtype="<i8").data)


def find_prefix(prefix: str) -> str:
    """The prefix whose `.bin` and `.idx` exist: `prefix` itself, without its ending, or with `_text_document`.

    Raises UserError that names the nearest pair in the same folder, or the missing file of a pair.
    """
    bare = prefix.removesuffix(".bin").removesuffix(".idx")
    for candidate in (bare, bare + DEFAULT_KEY_SUFFIX):
        present = [ending for ending in (".bin", ".idx") if exists(candidate + ending)]
        if len(present) == 2:
            return candidate
        if present:
            missing = ".idx" if present == [".bin"] else ".bin"
            raise UserError(
                f"{candidate}{missing} is missing next to {candidate}{present[0]}; preprocess the data again"
            )
    raise UserError(f'there are no data at "{prefix}" (no {bare}.bin and .idx). {_nearest_pair(bare)}')


def _nearest_pair(prefix: str) -> str:
    folder = Path(prefix).parent
    if "," in prefix:
        return "Give one prefix, not a list"
    if is_file(Path(prefix, "dataset_info.json")) or is_file(Path(prefix, "dataset_dict.json")):
        return f"This is a dataset of Hugging Face; preprocess it with --input hf:{prefix}"
    if not is_folder(folder):
        return f"The folder {folder} does not exist"
    pairs = sorted(path.stem for path in folder.glob("*.idx"))
    near = nearest(Path(prefix).name, pairs)
    if near:
        return f'Did you mean "{folder / near}"?'
    return f"The folder {folder} holds {', '.join(pairs[:5]) if pairs else 'no .idx file'}"


def _map(path: str, dtype: np.dtype[Any]) -> Ids:
    # numpy cannot map an empty file
    return np.memmap(path, mode="r", dtype=dtype) if Path(path).stat().st_size else np.empty(0, dtype)


def _read_header(path: str, index: npt.NDArray[np.uint8]) -> tuple[int, int, int]:
    """Code of the dtype, number of sequences, length of the document index, after checks."""
    if bytes(index[: len(CACHED_MAGIC)]) == CACHED_MAGIC:
        raise UserError(
            f'{path} is in the "cached"/"lazy" format, which Deepy does not read; '
            "preprocess the text again with --dataset-impl mmap"
        )
    if len(index) < HEADER.size or bytes(index[: len(MAGIC)]) != MAGIC:
        kind = what_instead_of_text(bytes(index[:SIGNATURE_BYTES]))
        found = f"it is {kind}" if kind not in (None, "binary data") else "it does not begin with MMIDIDX"
        raise UserError(f"{path} is not an index of token data: {found}")
    _, version, code, count, documents = HEADER.unpack(bytes(index[: HEADER.size]))
    if version != 1 or code not in DTYPES:
        raise UserError(f"{path}: version {version} with dtype code {code} holds no token ids that Deepy can read")
    expected = HEADER.size + 12 * count + 8 * documents
    if count and len(index) == expected + count:
        _require_text(path, index[expected:])
    elif len(index) != expected:
        raise UserError(f"{path} has {len(index):,} bytes and should have {expected:,}: it was cut short or is damaged")
    return code, count, documents


def _require_text(path: str, modes: npt.NDArray[np.uint8]) -> None:
    """Raise UserError unless the modes, which Megatron-core appends, are all 0, in constant memory."""
    others = sum(int(np.count_nonzero(modes[first : first + PIECE])) for first in range(0, len(modes), PIECE))
    if others:
        raise UserError(
            f"{path} is of a multimodal dataset of Megatron-core: {others:,} of {len(modes):,} sequences are not text. "
            "Deepy trains on text only; preprocess the text alone"
        )


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _full_disk_named(prefix: str) -> Iterator[None]:
    """Turn errors of a full disk into a RunError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"no space left on the disk while writing {prefix}.bin; nothing was kept") from error
