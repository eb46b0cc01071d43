"""What the tools that make data share: flags, exit codes, progress, a summary. Floor 2; no torch."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron.data.encoding import Job, Totals
from megatron.data.indexed import IndexedDataset
from megatron.errors import RunError, UserError

INTERRUPTED = 130


def new_parser(documentation: str | None) -> ArgumentParser:
    """A parser that shows a script's docstring as its help and takes no abbreviations."""
    return ArgumentParser(description=documentation, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The arguments with `-` for `_` in the names of flags: both spellings are in use."""
    words = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return words


def exit_code(main: Callable[[], None]) -> int:
    """Run `main`; 0 done, 1 the work failed, 2 the command or the input is wrong, 130 interrupted."""
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except (RunError, OSError) as error:  # OSError: no permission, no space
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


@contextmanager
def progress(input_bytes: int, num_docs: int | None, log_interval: int) -> Iterator[Callable[[Totals], None]]:
    """A function that shows how far the work is: a bar on a terminal, else a line every `log_interval` documents.

    input_bytes: on the disk, which the bar counts, unless num_docs says how many documents there are.
    """
    if not sys.stderr.isatty():
        yield _LinePrinter(log_interval)
        return
    from tqdm import tqdm  # a tenth of a second, in every process

    unit, total, scale = ("docs", num_docs, False) if num_docs else ("B", input_bytes, True)
    with tqdm(total=total, unit=unit, unit_scale=scale, dynamic_ncols=True) as bar:

        def show(totals: Totals) -> None:
            bar.set_postfix_str(f"{totals.documents:,} documents, {totals.tokens:,} tokens", refresh=False)
            bar.update((totals.documents if num_docs else totals.input_bytes) - bar.n)

        yield show


class _LinePrinter:
    def __init__(self, interval: int) -> None:
        self.interval = max(1, interval)
        self.printed = 0

    def __call__(self, totals: Totals) -> None:
        if totals.documents // self.interval > self.printed // self.interval:
            self.printed = totals.documents
            print(f"{totals.documents:,} documents, {totals.tokens:,} tokens, {speed(totals)}", flush=True)


def speed(totals: Totals) -> str:
    """Documents and megabytes of text in a second."""
    seconds = max(totals.seconds, 1e-3)
    return f"{totals.documents / seconds:,.0f} documents/s, {totals.text_bytes / seconds / 1e6:.1f} MB/s"


def summary(job: Job, totals: Totals) -> list[str]:
    """Lines that say what was made, and everything that did not go the plain way."""
    lines = [describe_pair(job.prefix(key)) for key in job.keys]
    lines.append(f"from {totals.text_bytes:,} bytes of text in {totals.seconds:.1f} s ({speed(totals)})")
    notes = {
        "empty documents left out": totals.empty,
        "documents left out for their length": totals.filtered,
        "duplicates left out": totals.duplicates,
        "documents in which U+FFFD stands for invalid text": totals.repaired,
        "documents that spell the end-of-document token in their own text": totals.contain_eod,
        "bad lines left out, the first of them:": totals.bad_lines,
    }
    lines += [f"{count:,} {note}" for note, count in notes.items() if count]
    return lines + [f"  {line}" for line in totals.bad_line_list]


def describe_pair(prefix: str) -> str:
    """One line about a pair of files."""
    dataset = IndexedDataset(prefix)
    size = dataset.num_tokens * dataset.dtype.itemsize
    return (
        f"{dataset.prefix}.bin: {len(dataset):,} documents, {dataset.num_tokens:,} tokens, "
        f"{size:,} bytes ({dataset.dtype.name})"
    )
