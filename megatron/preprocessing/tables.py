"""Read columns of .parquet files and datasets of Hugging Face, a few rows at a time. No torch.

The libraries are extras (`pip install deepy[corpora]`) and are imported when needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.errors import RunError, UserError
from megatron.preprocessing.sources import HUGGING_FACE

Columns = dict[str, list[Any]]  # key -> the values of some rows

MOST_ROWS = 256  # per batch, from a file
BUFFER = 1 << 20  # bytes of a column that are read at once
INSTALL = "pip install 'deepy[corpora]'"


def parquet_batches(path: str, keys: Sequence[str], skip: int, size: int) -> Iterator[tuple[Columns, int]]:
    """The columns `keys` of a .parquet file after `skip` rows, and about how many bytes of the file were read.

    Text that is not UTF-8 contains surrogates. Raises UserError without pyarrow or a column, RunError for a damaged
    file.
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
                    yield _columns_of(batch.slice(max(0, skip - done + batch.num_rows))), total * done // rows
    except (ArrowException, OSError) as error:
        raise RunError(f"{path} is damaged or not a .parquet file ({type(error).__name__}: {error})") from error


def _columns_of(batch: Any) -> Columns:
    """The values of a batch by column, with invalid bytes of texts as surrogates."""
    columns: Columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            columns[name] = column.to_pylist()
        except UnicodeDecodeError:
            if str(column.type) not in ("string", "large_string", "string_view"):
                raise
            values = column.cast("large_binary").to_pylist()
            columns[name] = [value and value.decode("utf-8", "surrogateescape") for value in values]
    return columns


def _rows_of(metadata: Any, keys: Sequence[str], size: int) -> int:
    """How many rows have about `size` bytes under `keys`, estimated from the row group with the largest rows."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    bytes_of = [
        sum(
            column.total_uncompressed_size
            for column in map(group.column, range(group.num_columns))
            if column.path_in_schema.split(".")[0] in keys
        )
        / max(1, group.num_rows)
        for group in groups
    ]
    return max(1, min(MOST_ROWS, int(size / max([1.0, *bytes_of]))))


def hugging_face_batches(name: str, keys: Sequence[str], skip: int, size: int) -> Iterator[tuple[Columns, int]]:
    """The columns `keys` of a dataset of Hugging Face after `skip` rows, streamed; bytes are unknown, hence 0.

    name: "hf:NAME", "hf:NAME:CONFIG" or "hf:NAME:CONFIG:SPLIT" (the default split is "train"); NAME may be a folder.
    Raises UserError without the library or a column, RunError where the dataset cannot be read.
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
    """Approximate size in bytes of a value of a table: a text, or a list of messages."""
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
    except Exception as error:  # of the library, the hub's client or HTTP
        if isinstance(error, UserError | RunError):
            raise
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise RunError(f"the dataset {name} could not be read ({reason})") from error
