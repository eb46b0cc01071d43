"""Find the inputs: files, folders, patterns, standard input, datasets of Hugging Face; all of them, or one shard.

No torch.
"""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron import files
from megatron.data.manifest import MANIFEST_ENDING, read_manifest
from megatron.errors import UserError
from megatron.preprocessing.compressed import COMPRESSIONS
from megatron.preprocessing.text_streams import is_utf8

LINES = (".jsonl", ".json")
ENDINGS = (*(kind + packed for kind in (*LINES, ".txt") for packed in COMPRESSIONS), ".parquet")
STANDARD_INPUT = "-"
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Span:
    """A part of an input: the lines that begin in bytes start .. stop of a plain .jsonl file, or any input whole."""

    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Shard:
    """Shard number `index` of `count`, from 0."""

    index: int
    count: int


def find_inputs(names: str, announce: Callable[[str], None] = lambda line: None) -> list[str]:
    """The inputs that a comma-separated list of files, folders and patterns (`data/**/*.jsonl`) names, in order.

    `~` and variables are expanded. "-" is standard input (JSON lines), "hf:NAME" a dataset of Hugging Face; both are
    returned unchanged. Folders and patterns leave out hidden files and manifests of preprocessed data; announce is
    called with a line that says how many.
    Raises UserError for a name without a file, or a file whose ending is not one of ENDINGS.
    """
    found: list[str] = []
    for name in [names] if files.is_file(names) else (name.strip() for name in names.split(",")):
        matches = _matches(name if files.exists(name) else files.expanded(name, "--input"), announce)
        if not matches:
            kinds = ", ".join(ending for ending in ENDINGS if not ending.endswith(COMPRESSIONS[1:]))
            raise UserError(f'input "{name}": no such file, and no file ending in {kinds} in such a folder')
        found += matches
    wrong = [path for path in found if is_on_disk(path) and not path.endswith(ENDINGS)]
    if wrong:
        raise UserError(*(f"{path}: Deepy reads files ending in {', '.join(ENDINGS)}" for path in wrong))
    return found


def is_on_disk(path: str) -> bool:
    """Whether an input is a file, which can be read again."""
    return path != STANDARD_INPUT and not path.startswith(HUGGING_FACE)


def is_splittable(path: str) -> bool:
    """Whether an input is a file of plain lines, which can be read from the middle."""
    return is_on_disk(path) and path.endswith(LINES) and is_utf8(path)


def input_size(path: str) -> int:
    """Bytes on disk; 0 for standard input and datasets of Hugging Face."""
    return Path(path).stat().st_size if is_on_disk(path) else 0


def plan_spans(inputs: Sequence[str], shard: Shard | None = None) -> list[Span]:
    """The spans that one run reads. Those of all shards, in order, are the inputs with each line once and in order.

    A shard is a range of bytes of all inputs together; a file that cannot be split belongs to the shard of its first
    byte. Raises UserError for inputs whose size is not known.
    """
    if shard is None:
        return [Span(path) for path in inputs]
    if unknown := [path for path in inputs if not is_on_disk(path)]:
        raise UserError(f'--shard needs files, whose size is known beforehand; "{unknown[0]}" is not a file')
    total = sum(map(input_size, inputs))
    first, last = (total * number // shard.count for number in (shard.index, shard.index + 1))
    spans, begin = [], 0
    for path in inputs:
        size = input_size(path)
        if is_splittable(path):
            start, stop = max(first - begin, 0), min(last - begin, size)
            if start < stop:
                spans.append(Span(path, start, stop if stop < size else None))
        elif first <= begin < last:
            spans.append(Span(path))
        begin += size
    return spans


def _matches(name: str, announce: Callable[[str], None]) -> list[str]:
    if not is_on_disk(name):
        return [name]
    if not name or files.is_file(name):  # an empty name would be the current folder
        return [name] if name else []
    pattern = f"{glob.escape(name)}/*" if files.is_folder(name) else name
    try:
        chosen, everything = (
            glob.glob(pattern, recursive=True, include_hidden=hidden)  # noqa: PTH207 (Path.glob: no absolute patterns)
            for hidden in (False, True)
        )
    except (OSError, ValueError):  # a zero byte, or longer than a path can be
        return []
    if files.is_folder(name):
        chosen, everything = ([path for path in paths if path.endswith(ENDINGS)] for paths in (chosen, everything))
    hidden = len([path for path in set(everything) - set(chosen) if files.is_file(path)])
    found = sorted(path for path in chosen if files.is_file(path))
    inputs = [path for path in found if not _is_manifest(path)]
    for count, kind in ((hidden, "hidden files"), (len(found) - len(inputs), "manifests of preprocessed data")):
        if count:
            announce(f'input "{name}": {count:,} {kind} left out')
    return inputs


def _is_manifest(path: str) -> bool:
    return path.endswith(MANIFEST_ENDING) and read_manifest(path.removesuffix(MANIFEST_ENDING)) is not None
