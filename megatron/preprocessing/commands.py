"""Shared by the tools that prepare data: flags, exit codes, progress, a summary. No torch."""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron import files
from megatron.data.indexed import IndexedDataset
from megatron.data.manifest import manifest_path
from megatron.errors import RunError, UserError
from megatron.preprocessing.fast_encoding.checked import EncoderSettings
from megatron.preprocessing.fast_encoding.comparison import CHOICES, choose
from megatron.preprocessing.job import Job, Texts, Totals
from megatron.preprocessing.pipeline import preprocess
from megatron.preprocessing.sources import Shard, find_inputs, input_size, is_on_disk
from megatron.preprocessing.text_streams import check_inputs
from megatron.progress import Progress
from megatron.registry import names
from megatron.terminal import footer, live
from megatron.tokenizer.build import TokenizerSettings


def new_parser(documentation: str | None) -> ArgumentParser:
    """A parser that shows a script's docstring as its help and accepts no abbreviated flags."""
    return ArgumentParser(description=documentation, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """The arguments with `_` replaced by `-` in the names of flags, since both spellings are in use."""
    words = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        words.append(name.replace("_", "-") + equals + value if name.startswith("--") else argument)
    return words


def add_work_flags(parser: ArgumentParser) -> None:
    """The flags of the tools that tokenize: input, output, tokenizer, error handling, workers, resuming, progress."""
    add = parser.add_argument
    add("--input", required=True, metavar="PATH[,PATH...]", help="files, folders or patterns, separated by commas")
    add("--output-prefix", required=True, type=prefix, metavar="PREFIX", help="how the paths of the files begin")
    add("--tokenizer-type", required=True, choices=names("tokenizer"))
    add_vocabulary_flags(parser)
    add("--backend", choices=CHOICES, default="auto", help="library that tokenizes, with the same ids; hf: tokenizers")
    add("--skip-bad-lines", action="store_true", help="leave out and count unusable lines (default: the run ends)")
    add("--num-docs", type=int, metavar="COUNT", help="total documents, for the progress bar (default: it shows bytes)")
    help_of_workers = "threads, or processes for slow backends (default: 1, which uses the library's own threads)"
    add("--workers", type=positive, default=1, metavar="COUNT", help=help_of_workers)
    add("--shard", type=shard, metavar="INDEX/COUNT", help="process one shard (from 0); merge_datasets.py joins them")
    add("--resume", action="store_true", help="resume an interrupted run with the same settings")
    add("--checkpoint-seconds", type=float, default=10, metavar="SECONDS", help="between checkpoints (default: 10)")
    add("--log-interval", type=int, default=100, metavar="COUNT", help="documents per line without a terminal (100)")


def add_vocabulary_flags(parser: ArgumentParser) -> None:
    """The files and the end-of-document token of a tokenizer."""
    add = parser.add_argument
    help_of_vocab = "tokenizer.json, vocab.json, .model, .tiktoken, or the name of an encoding"
    add("--vocab-file", "--vocab", type=path, metavar="FILE", help=help_of_vocab)
    add("--merge-file", type=path, metavar="FILE", help="merges.txt, for GPT-2's tokenizers")
    add("--end-of-document-token", metavar="TOKEN", help="a token of the vocabulary (default: the tokenizer's own)")


def path(text: str) -> str:
    """A path with `~` and variables expanded. Raises ArgumentTypeError, which the parser reports."""
    try:
        return text if files.exists(text) else files.expanded(text, "path")
    except UserError as error:
        raise ArgumentTypeError(str(error)) from error


def prefix(text: str) -> str:
    """The beginning of the names of output files, expanded. Raises ArgumentTypeError for a folder."""
    found = path(text)
    if not found or found.endswith("/") or files.is_folder(found):
        folder = found.rstrip("/") or ("/" if found else "FOLDER")
        raise ArgumentTypeError(f'"{text}" is a folder; add the beginning of the file names, such as {folder}/mine')
    return found


def output_file(text: str) -> str:
    """The path of an output file, expanded. Raises ArgumentTypeError for a folder."""
    found = path(text)
    if not found or found.endswith("/") or files.is_folder(found):
        raise ArgumentTypeError(f'"{text}" is a folder; add the name of the file')
    return found


def shard(text: str) -> Shard:
    """Parse INDEX/COUNT. Raises ArgumentTypeError, which the parser reports."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ArgumentTypeError(f'"{text}" is not INDEX/COUNT, such as 0/8, with INDEX from 0 to COUNT - 1')
    return Shard(int(match[1]), int(match[2]))


def positive(text: str) -> int:
    """A positive integer. Raises ArgumentTypeError, which the parser reports."""
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise ArgumentTypeError(f'"{text}" is not a positive integer')
    return int(text)


def do_work(arguments: Namespace, **settings: Any) -> None:
    """Check everything that can be checked first, then tokenize. settings: of the job, besides those of the flags."""
    job = Job(
        inputs=tuple(find_inputs(arguments.input, say)),
        output_prefix=arguments.output_prefix,
        skip_bad_lines=arguments.skip_bad_lines,
        shard=arguments.shard,
        workers=arguments.workers,
        checkpoint_seconds=arguments.checkpoint_seconds,
        **settings,
    )
    inputs = [path for path in job.inputs if is_on_disk(path)]
    files.refuse_overwriting(
        {"output": manifest_path(job.output_prefix)}, {f"input {number}": path for number, path in enumerate(inputs, 1)}
    )
    check_inputs(inputs, single_bytes=not job.skip_bad_lines)
    tokenizer = TokenizerSettings(
        arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file, arguments.end_of_document_token
    )
    say(tokenizer().describe())
    with output_locked(job.output_prefix, *map(job.prefix, job.pairs)):
        encoder = EncoderSettings(tokenizer, choose(tokenizer, arguments.backend, say))
        say(encoder.describe())
        try:
            with progress(sum(map(input_size, job.inputs)), arguments.num_docs, arguments.log_interval) as show:
                totals = preprocess(job, encoder, show, arguments.resume, say)
        except (RunError, KeyboardInterrupt, OSError):
            kept = Path(f"{job.output_prefix}.journal").exists()
            say("the work up to the last checkpoint is kept: --resume continues it" if kept else "no output was kept")
            raise
    say("\n".join(summary(job, totals)))


@contextmanager
def output_locked(*prefixes: str) -> Iterator[None]:
    """Keep other runs from writing files that begin with one of `prefixes`.

    Raises UserError, naming the process that writes there already, or where nothing can be written.
    """
    with ExitStack() as stack:
        for found in dict.fromkeys(prefixes):
            try:
                Path(found).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--output-prefix ({found}): its folder cannot be made: {error.strerror}") from error
            lock = files.FileLock(Path(f"{found}.lock"), f"--output-prefix ({found})", temporary=True)
            stack.enter_context(lock)
        yield


def say(line: str) -> None:
    """Print a line and flush."""
    print(line, flush=True)


@contextmanager
def progress(input_bytes: int, num_docs: int | None, log_interval: int) -> Iterator[Callable[[Totals], None]]:
    """A function that shows progress: a bar on a terminal, else a line every `log_interval` documents.

    input_bytes: the total that the bar shows, unless num_docs gives the number of documents.
    """
    with live():
        if footer() is None:
            yield _LinePrinter(log_interval)
            return
        total, unit = (num_docs, "documents") if num_docs else (input_bytes, "B")
        with Progress("preprocessing", total, unit) as bar:

            def show(totals: Totals) -> None:
                bar.note = f"{totals.documents:,} documents, {totals.tokens:,} tokens"
                bar.add((totals.documents if num_docs else totals.input_bytes) - bar.done)

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
    """Documents and megabytes of text per second."""
    seconds = max(totals.seconds, 1e-3)
    return f"{totals.documents / seconds:,.0f} documents/s, {totals.text_bytes / seconds / 1e6:.1f} MB/s"


def summary(job: Job, totals: Totals) -> list[str]:
    """Lines about the output, and counts of what was repaired or left out."""
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
