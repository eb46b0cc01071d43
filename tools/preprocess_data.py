r"""Tokenize text into OUTPUT_PREFIX_<key>_document.bin and .idx, which data_path names.

    python tools/preprocess_data.py --input a.jsonl,b.jsonl.zst --tokenizer-type HFTokenizer \
        --vocab-file tokenizer.json --output-prefix data/mine --append-eod

Reads .jsonl (one JSON object a line) and .txt (one document), plain, .gz or .zst; also folders and patterns of them.
The files are in the format of GPT-NeoX and Megatron-LM. The order of documents is kept: shuffle them beforehand.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.data.commands import exit_code, new_parser, progress, summary, with_dashes
from megatron.data.documents import find_inputs
from megatron.data.preprocess import Job, preprocess
from megatron.errors import UserError
from megatron.registry import names
from megatron.tokenizer.build import TokenizerSettings


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
    add("--ftfy", action="store_true", help="mend broken Unicode with ftfy")
    add(
        "--skip-bad-lines", action="store_true", help="leave out and count lines that cannot be used, instead of ending"
    )
    add("--num-docs", type=int, metavar="N", help="documents there are, for the progress bar (default: go by bytes)")
    add("--workers", type=int, default=1, metavar="N", help="processes; 1 uses the threads of the tokenizer's library")
    add(
        "--log-interval", type=int, default=100, metavar="N", help="documents between lines, where there is no terminal"
    )
    add("--dataset-impl", choices=["mmap", "lazy", "cached"], default="mmap", help="mmap is the one there is")
    return parser.parse_args(with_dashes(arguments))


def run(arguments: Namespace) -> None:
    """Check everything that can be checked first, then tokenize."""
    if arguments.dataset_impl != "mmap":
        raise UserError(
            f"--dataset-impl {arguments.dataset_impl}: Deepy writes mmap only, which is read faster "
            "than the old formats and without loading anything into memory"
        )
    job = Job(
        inputs=tuple(find_inputs(arguments.input)),
        output_prefix=arguments.output_prefix,
        keys=tuple(dict.fromkeys(arguments.jsonl_keys)),
        append_eod=arguments.append_eod,
        ftfy=arguments.ftfy,
        skip_bad_lines=arguments.skip_bad_lines,
        workers=arguments.workers,
    )
    make_tokenizer = TokenizerSettings(
        arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file, arguments.end_of_document_token
    )
    print(make_tokenizer().describe(), flush=True)
    size = sum(Path(path).stat().st_size for path in job.inputs)
    with progress(size, arguments.num_docs, arguments.log_interval) as show:
        totals = preprocess(job, make_tokenizer, show)
    print("\n".join(summary(job, totals)))


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
