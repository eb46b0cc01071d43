r"""Tokenize text into OUTPUT_PREFIX_<key>_document.bin and .idx, which data_path names.

    python tools/preprocess_data.py --input a.jsonl,b.jsonl.zst --tokenizer-type HFTokenizer \
        --vocab-file tokenizer.json --output-prefix data/mine --append-eod --workers 8

Reads .jsonl (one JSON object per line) and .txt (one document), plain, .gz or .zst, and .parquet; folders and patterns
of them; "-" is standard input (JSON lines), hf:NAME[:CONFIG[:SPLIT]] a dataset of Hugging Face, streamed.
The files are in the format of GPT-NeoX and Megatron-LM; OUTPUT_PREFIX_manifest.json lists inputs, settings and hashes.
Documents keep their order; tools/merge_datasets.py --shuffle shuffles them. See docs/data.md.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from megatron.errors import UserError, exit_code
from megatron.preprocessing.commands import add_work_flags, do_work, new_parser, with_dashes
from megatron.preprocessing.job import Texts


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags, named as in GPT-NeoX where they mean the same."""
    parser = new_parser(__doc__)
    add_work_flags(parser)
    add = parser.add_argument
    add(
        "--jsonl-keys", nargs="+", default=["text"], metavar="KEY", help="keys to read, each into its own pair of files"
    )
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--ftfy", action="store_true", help="repair broken Unicode with ftfy")
    add("--deduplicate", action="store_true", help="leave out all but the first of equal documents")
    add("--min-chars", type=int, default=0, metavar="COUNT", help="leave out documents with fewer characters")
    add("--max-chars", type=int, metavar="COUNT", help="leave out documents with more characters")
    add("--dataset-impl", choices=["mmap", "lazy", "cached"], default="mmap", help="only mmap is supported")
    return parser.parse_args(with_dashes(arguments))


def run(arguments: Namespace) -> None:
    """Refuse conflicting flags, then tokenize."""
    if arguments.dataset_impl != "mmap":
        raise UserError(
            f"--dataset-impl {arguments.dataset_impl}: Deepy writes mmap only, which is read faster "
            "than the old formats and without loading anything into memory"
        )
    if arguments.deduplicate and arguments.shard:
        raise UserError("--deduplicate cannot be combined with --shard: duplicates in different shards would stay")
    if wrong := [key for key in arguments.jsonl_keys if "/" in key]:
        raise UserError(f'--jsonl-keys: "{wrong[0]}" is part of a file name, so it cannot contain "/"; rename the key')
    form = Texts(
        append_eod=arguments.append_eod,
        ftfy=arguments.ftfy,
        min_chars=arguments.min_chars,
        max_chars=arguments.max_chars,
        deduplicate=arguments.deduplicate,
    )
    do_work(arguments, keys=tuple(dict.fromkeys(arguments.jsonl_keys)), form=form)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
