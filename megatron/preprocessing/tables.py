"""Columns of text out of .parquet files and datasets of Hugging Face, a few rows at a time. No torch.

The libraries are extras (`pip install deepy[corpora]`), and are imported when they are needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import RunError, UserError
from megatron.preprocessing.sources import HUGGING_FACE

Columns = dict[str, list[Any]]  # key -> the values of some rows

MOST_ROWS = 256  # at a time, from a file
BUFFER = 1 << 20  # bytes of a column at a time, in place of the whole of it
INSTALL = "pip install 'deepy[corpora]'"


def parquet_batches(path: str, keys: Sequence[str], skip: int, size: int) -> Iterator[tuple[Columns, int]]:
    """The columns `keys` of a .parquet file after `skip` rows, with the bytes of the file that are done, about.

    Raises UserError without pyarrow or a column, RunError for a damaged file.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{path}: .parquet files are read with pyarrow; {INSTALL}") from error
    total = Path(path).stat().st_size
    try:
        with parquet.ParquetFile(path, buffer_size=BUFFER) as file:
            if missing := [key for key in keys if key not in file.schema_arrow.names]:
                raise UserError(f'{path} has no column "{missing[0]}" (columns: {", ".join(file.schema_arrow.names)})')
            done, rows = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_rows_of(file.metadata, keys, size), columns=list(keys)):
                done += batch.num_rows
                if done > skip:
                    columns = batch.slice(max(0, skip - done + batch.num_rows)).to_pydict()
                    yield columns, total * done // rows
    except (ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged or no .parquet file: {error}") from error


def _rows_of(metadata: Any, keys: Sequence[str], size: int) -> int:
    """How many rows have about `size` bytes under `keys`, judged by the largest row group."""
    groups = [metadata.row_group(number).to_dict() for number in range(metadata.num_row_groups)]
    bytes_of = [
        sum(
            column["total_uncompressed_size"]
            for column in group["columns"]
            if column["path_in_schema"].split(".")[0] in keys
        )
        / max(1, group["num_rows"])
        for group in groups
    ]
    return max(1, min(MOST_ROWS, int(size / max([1.0, *bytes_of]))))


def hugging_face_batches(name: str, keys: Sequence[str], skip: int, size: int) -> Iterator[tuple[Columns, int]]:
    """The columns `keys` of a dataset of Hugging Face after `skip` rows, streamed; the bytes are not known, hence 0.

    name: "hf:NAME", "hf:NAME:CONFIG" or "hf:NAME:CONFIG:SPLIT" (the split is "train" if it is left out); NAME may be a
    folder. Raises UserError without the library or a column, RunError where the dataset cannot be reached.
    """
    columns: Columns = {key: [] for key in keys}
    count = 0
    for row in hugging_face_rows(name, skip):
        for key in keys:
            if key not in row:
                raise UserError(f'{name} has no column "{key}" (columns: {", ".join(row)})')
            columns[key].append(row[key])
            count += size_of(row[key])
        if count >= size:
            yield columns, 0
            columns, count = {key: [] for key in keys}, 0
    if columns[keys[0]]:
        yield columns, 0


def size_of(value: Any) -> int:
    """About how many bytes a value of a table takes: a text, or a list of messages."""
    return len(value) if isinstance(value, str) else len(repr(value))


def hugging_face_rows(name: str, skip: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of a dataset of Hugging Face (see `hugging_face_batches`) after the first `skip`, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name}: datasets of Hugging Face are read with the library datasets; {INSTALL}") from error
    dataset, config, split = [*name.removeprefix(HUGGING_FACE).split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        yield from rows.skip(skip) if skip else rows
    except Exception as error:  # the library, the hub's client and HTTP raise kinds of their own
        if isinstance(error, UserError | RunError):
            raise
        raise RunError(f"{name} could not be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error
