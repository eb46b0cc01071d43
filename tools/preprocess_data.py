r"""Tokenize text into OUTPUT_PREFIX_<key>_document.bin and .idx, which data_path names.

    python tools/preprocess_data.py --input a.jsonl,b.jsonl.zst --tokenizer-type HFTokenizer \
        --vocab-file tokenizer.json --output-prefix data/mine --append-eod --workers 8

Reads .jsonl (one JSON object a line) and .txt (one document), plain, .gz or .zst, and .parquet; folders and patterns of
them; "-" is standard input (JSON lines), hf:NAME[:CONFIG[:SPLIT]] a dataset of Hugging Face, streamed.
The files are in the format of GPT-NeoX and Megatron-LM; OUTPUT_PREFIX_manifest.json says what they were made of.
The order of documents is kept: tools/merge_datasets.py --shuffle mixes them. See docs/data.md.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.data.commands import exit_code, new_parser, progress, summary, with_dashes
from megatron.data.encoding import Job
from megatron.data.inputs import Shard, find_inputs, input_size
from megatron.data.preprocess import preprocess
from megatron.errors import RunError, UserError
from megatron.registry import names
from megatron.tokenizer.build import TokenizerSettings
from megatron.tokenizer.checked import EncoderSettings
from megatron.tokenizer.comparison import CHOICES, choose


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags, named as in GPT-NeoX where they mean the same."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, metavar="A[,B...]", help="files, folders or patterns, separated by commas")
    add("--output-prefix", required=True, metavar="P", help="where to write; a missing folder is made")
    add("--jsonl-keys", nargs="+", default=["text"], metavar="KEY", help="keys to read, each into a pair of its own")
    add("--tokenizer-type", required=True, choices=names("tokenizer"))
    add("--vocab-file", "--vocab", metavar="V", help="tokenizer.json, vocab.json, .model, .tiktoken, or encoding name")
    add("--merge-file", metavar="M", help="merges.txt, for GPT-2's tokenizers")
    add("--end-of-document-token", metavar="TOKEN", help="a token of the vocabulary (default: the tokenizer's own)")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--backend", choices=CHOICES, default="auto", help="what tokenizes; the ids are the same; hf: its own library")
    add("--ftfy", action="store_true", help="mend broken Unicode with ftfy")
    add("--deduplicate", action="store_true", help="leave out all but the first of equal documents")
    add("--min-chars", type=int, default=0, metavar="N", help="leave out documents of fewer characters")
    add("--max-chars", type=int, metavar="N", help="leave out documents of more characters")
    add("--skip-bad-lines", action="store_true", help="leave out and count lines that cannot be used; default: end")
    add("--num-docs", type=int, metavar="N", help="documents there are, for the progress bar (default: go by bytes)")
    add(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="threads, or processes for slow backends (1: as the library likes)",
    )
    add("--shard", type=shard, metavar="I/N", help="do share I (from 0) of N only; tools/merge_datasets.py joins them")
    add("--resume", action="store_true", help="go on where an interrupted run of the same work stopped")
    add("--checkpoint-seconds", type=float, default=10, metavar="S", help="work that an interruption may cost (10)")
    add("--log-interval", type=int, default=100, metavar="N", help="documents between lines without a terminal (100)")
    add("--dataset-impl", choices=["mmap", "lazy", "cached"], default="mmap", help="mmap is the one there is")
    return parser.parse_args(with_dashes(arguments))


def shard(text: str) -> Shard:
    """Share I/N. Raises ValueError, which the parser reports."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(text)
    return Shard(int(match[1]), int(match[2]))


def run(arguments: Namespace) -> None:
    """Check everything that can be checked first, then tokenize."""
    if arguments.dataset_impl != "mmap":
        raise UserError(
            f"--dataset-impl {arguments.dataset_impl}: Deepy writes mmap only, which is read faster "
            "than the old formats and without loading anything into memory"
        )
    if arguments.deduplicate and arguments.shard:
        raise UserError("--deduplicate sees one share only: with --shard, duplicates across shares would stay")
    job = Job(
        inputs=tuple(find_inputs(arguments.input)),
        output_prefix=arguments.output_prefix,
        keys=tuple(dict.fromkeys(arguments.jsonl_keys)),
        append_eod=arguments.append_eod,
        ftfy=arguments.ftfy,
        min_chars=arguments.min_chars,
        max_chars=arguments.max_chars,
        deduplicate=arguments.deduplicate,
        skip_bad_lines=arguments.skip_bad_lines,
        shard=arguments.shard,
        workers=arguments.workers,
        checkpoint_seconds=arguments.checkpoint_seconds,
    )
    tokenizer = TokenizerSettings(
        arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file, arguments.end_of_document_token
    )
    print(tokenizer().describe(), flush=True)
    encoder = EncoderSettings(tokenizer, choose(tokenizer, arguments.backend, say))
    say(encoder.describe())
    try:
        with progress(sum(map(input_size, job.inputs)), arguments.num_docs, arguments.log_interval) as show:
            totals = preprocess(job, encoder, show, arguments.resume, say)
    except (RunError, KeyboardInterrupt, OSError):
        kept = Path(f"{job.output_prefix}.journal").exists()
        say("the work up to the last checkpoint is kept: --resume goes on" if kept else "no output was kept")
        raise
    print("\n".join(summary(job, totals)))


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
