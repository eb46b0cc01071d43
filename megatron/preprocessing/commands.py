"""What the tools that make data share: flags, exit codes, progress, a summary. No torch."""

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.data.indexed import IndexedDataset
from megatron.errors import RunError, UserError
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.fast_encoding.comparison import CHOICES, choose
from megatron.preprocessing.job import Job, Texts, Totals
from megatron.preprocessing.pipeline import preprocess
from megatron.preprocessing.sources import Shard, find_inputs, input_size
from megatron.registry import names
from megatron.tokenizer.build import TokenizerSettings

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


def add_work_flags(parser: ArgumentParser) -> None:
    """The flags of the tools that tokenize: from where to where, with what, how much of it, and how it is shown."""
    add = parser.add_argument
    add("--input", required=True, metavar="A[,B...]", help="files, folders or patterns, separated by commas")
    add("--output-prefix", required=True, metavar="P", help="where to write; a missing folder is made")
    add("--tokenizer-type", required=True, choices=names("tokenizer"))
    add("--vocab-file", "--vocab", metavar="V", help="tokenizer.json, vocab.json, .model, .tiktoken, or encoding name")
    add("--merge-file", metavar="M", help="merges.txt, for GPT-2's tokenizers")
    add("--end-of-document-token", metavar="TOKEN", help="a token of the vocabulary (default: the tokenizer's own)")
    add("--backend", choices=CHOICES, default="auto", help="what tokenizes; the ids are the same; hf: its own library")
    add("--skip-bad-lines", action="store_true", help="leave out and count lines that cannot be used; default: end")
    add("--num-docs", type=int, metavar="N", help="documents there are, for the progress bar (default: go by bytes)")
    help_of_workers = "threads, or processes for slow backends (1: as the library likes)"
    add("--workers", type=positive, default=1, metavar="N", help=help_of_workers)
    add("--shard", type=shard, metavar="I/N", help="do share I (from 0) of N only; tools/merge_datasets.py joins them")
    add("--resume", action="store_true", help="go on where an interrupted run of the same work stopped")
    add("--checkpoint-seconds", type=float, default=10, metavar="S", help="work that an interruption may cost (10)")
    add("--log-interval", type=int, default=100, metavar="N", help="documents between lines without a terminal (100)")


def shard(text: str) -> Shard:
    """Share I/N. Raises ArgumentTypeError, which the parser reports."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ArgumentTypeError(f'"{text}" is not I/N, such as 0/8, with I from 0 to N - 1')
    return Shard(int(match[1]), int(match[2]))


def positive(text: str) -> int:
    """A number from 1 on. Raises ArgumentTypeError, which the parser reports."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ArgumentTypeError(f'"{text}" is not a number from 1 on')
    return int(text)


def do_work(arguments: Namespace, **settings: Any) -> None:
    """Check everything that can be checked first, then tokenize. settings: of the job, besides those of the flags."""
    job = Job(
        inputs=tuple(find_inputs(arguments.input)),
        output_prefix=arguments.output_prefix,
        skip_bad_lines=arguments.skip_bad_lines,
        shard=arguments.shard,
        workers=arguments.workers,
        checkpoint_seconds=arguments.checkpoint_seconds,
        **settings,
    )
    tokenizer = TokenizerSettings(
        arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file, arguments.end_of_document_token
    )
    say(tokenizer().describe())
    encoder = EncoderSettings(tokenizer, choose(tokenizer, arguments.backend, say))
    say(encoder.describe())
    try:
        with progress(sum(map(input_size, job.inputs)), arguments.num_docs, arguments.log_interval) as show:
            totals = preprocess(job, encoder, show, arguments.resume, say)
    except (RunError, KeyboardInterrupt, OSError):
        kept = Path(f"{job.output_prefix}.journal").exists()
        say("the work up to the last checkpoint is kept: --resume goes on" if kept else "no output was kept")
        raise
    say("\n".join(summary(job, totals)))


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


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
    lines = [describe_pair(job.prefix(pair)) for pair in job.pairs]
    lines.append(f"from {totals.text_bytes:,} bytes of text in {totals.seconds:.1f} s ({speed(totals)})")
    if not isinstance(job.form, Texts):
        lines.append(f"{totals.learned:,} of {totals.tokens:,} tokens are learned")
    lines += totals.notes()
    return lines + [f"  {line}" for line in totals.bad_line_list]


def describe_pair(prefix: str) -> str:
    """One line about a pair of files."""
    dataset = IndexedDataset(prefix)
    size = dataset.num_tokens * dataset.dtype.itemsize
    return (
        f"{dataset.prefix}.bin: {len(dataset):,} documents, {dataset.num_tokens:,} tokens, "
        f"{size:,} bytes ({dataset.dtype.name})"
    )
