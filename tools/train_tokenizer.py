"""Train a byte-level BPE and write it as a tokenizer.json, for tokenizer_type HFTokenizer.

    python tools/train_tokenizer.py --input a.jsonl,b.txt --output tokenizer.json --vocab-size 32000

Reads the same files as preprocess_data.py. The end-of-document token gets id 0.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.errors import exit_code
from megatron.files import FileLock, refuse_overwriting
from megatron.preprocessing.commands import new_parser, output_file, positive, say, with_dashes
from megatron.preprocessing.documents import read_texts
from megatron.preprocessing.sources import find_inputs, is_on_disk
from megatron.tokenizer.base import END_OF_DOCUMENT
from megatron.tokenizer.train import train_byte_level_bpe


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags; GPT-NeoX's names are taken as well."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--input", "--json-input-dir", required=True, metavar="PATH[,...]", help="files, folders or patterns")
    add(
        "--output",
        "--tokenizer-output-path",
        type=output_file,
        required=True,
        metavar="FILE",
        help="the tokenizer.json to write",
    )
    add("-v", "--vocab-size", type=positive, default=52000, metavar="N", help="ids, with the end of a document (52000)")
    add("--jsonl-key", default="text", metavar="KEY", help="key of the text in JSON lines (text)")
    add("--end-of-document-token", default=END_OF_DOCUMENT, metavar="TOKEN", help=f"({END_OF_DOCUMENT})")
    add("--tokenizer-type", choices=["BPE"], default="BPE", help="only BPE is supported")
    return parser.parse_args(with_dashes(arguments))


def run(arguments: Namespace) -> None:
    """Train and write."""
    inputs = find_inputs(arguments.input, say)
    files = [path for path in inputs if is_on_disk(path)]
    refuse_overwriting(
        {"--output": arguments.output}, {f"input {number}": path for number, path in enumerate(files, 1)}
    )
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_name(f"{output.name}.lock"), f"--output ({output})", temporary=True):
        texts = read_texts(inputs, arguments.jsonl_key)
        size = train_byte_level_bpe(
            texts, arguments.vocab_size, str(output), arguments.end_of_document_token, sys.stderr.isatty()
        )
    note = "" if size == arguments.vocab_size else f" (not {arguments.vocab_size:,}: the text has no more to merge)"
    print(f"{arguments.output}: byte-level BPE, {size:,} ids{note}")


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
