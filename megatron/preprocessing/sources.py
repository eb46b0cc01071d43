"""Which texts are read: files, folders, patterns, standard input, datasets of Hugging Face; whole, or one share of n.

No torch.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import UserError
from megatron.preprocessing.compressed import COMPRESSIONS

LINES = (".jsonl", ".json")
ENDINGS = (*(kind + packed for kind in (*LINES, ".txt") for packed in COMPRESSIONS), ".parquet")
STANDARD_INPUT = "-"
HUGGING_FACE = "hf:"


@dataclass(frozen=True)
class Span:
    """A part of an input: the lines that begin in bytes start .. stop of a plain .jsonl file; of another, the whole."""

    path: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Shard:
    """Share number `index` of `count`, from 0."""

    index: int
    count: int


def find_inputs(names: str) -> list[str]:
    """The inputs that a comma-separated list of files, folders and patterns (`data/**/*.jsonl`) stands for, in order.

    "-" is standard input (JSON lines), "hf:NAME" a dataset of Hugging Face; both are kept as they are.
    Raises UserError for a name that stands for nothing, or a file whose ending is not one of ENDINGS.
    """
    found: list[str] = []
    for name in [names] if Path(names).is_file() else (name.strip() for name in names.split(",")):
        matches = _matches(name)
        if not matches:
            kinds = ", ".join(ending for ending in ENDINGS if not ending.endswith(COMPRESSIONS[1:]))
            raise UserError(f'input "{name}": no such file, and no file ending in {kinds} in such a folder')
        found += matches
    wrong = [path for path in found if is_file(path) and not path.endswith(ENDINGS)]
    if wrong:
        raise UserError(*(f"{path}: Deepy reads files ending in {', '.join(ENDINGS)}" for path in wrong))
    return found


def is_file(path: str) -> bool:
    """Whether an input is a file, whose size and content can be looked at again."""
    return path != STANDARD_INPUT and not path.startswith(HUGGING_FACE)


def input_size(path: str) -> int:
    """Bytes on the disk; 0 where that is not known beforehand."""
    return Path(path).stat().st_size if is_file(path) else 0


def plan_spans(inputs: Sequence[str], shard: Shard | None = None) -> list[Span]:
    """What one run reads. The shares of all shards, one after another, are the inputs, each line once and in order.

    A share is a stretch of bytes of all inputs together; a file that is not plain lines belongs where it begins.
    Raises UserError for inputs that cannot be shared out.
    """
    if shard is None:
        return [Span(path) for path in inputs]
    if unknown := [path for path in inputs if not is_file(path)]:
        raise UserError(f'--shard needs files, whose size is known beforehand; "{unknown[0]}" is none')
    total = sum(map(input_size, inputs))
    first, last = (total * number // shard.count for number in (shard.index, shard.index + 1))
    spans, begin = [], 0
    for path in inputs:
        size = input_size(path)
        if path.endswith(LINES):
            start, stop = max(first - begin, 0), min(last - begin, size)
            if start < stop:
                spans.append(Span(path, start, stop if stop < size else None))
        elif first <= begin < last:
            spans.append(Span(path))
        begin += size
    return spans


def _matches(name: str) -> list[str]:
    path = Path(name)
    if not is_file(name):
        return [name]
    if not name:  # which would be the folder one is in
        return []
    if path.is_dir():
        return sorted(str(entry) for entry in path.iterdir() if entry.name.endswith(ENDINGS))
    return [name] if path.is_file() else _matching(name)


def _matching(pattern: str) -> list[str]:
    found = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute patterns)
    return [path for path in found if Path(path).is_file()]
