r"""Verify a pair of token files, and show documents decoded.

    python tools/inspect_dataset.py data/mine_text_document
    python tools/inspect_dataset.py data/mine_text_document --tokenizer-type HFTokenizer --vocab-file tokenizer.json \
        --documents 0 17 --characters 2000

Exit code 0: nothing is wrong; 1: one line for each problem.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from megatron.data.indexed import IndexedDataset
from megatron.data.inspection import describe, problems, show
from megatron.errors import RunError, UserError, exit_code
from megatron.preprocessing.commands import describe_pair, new_parser, path, with_dashes
from megatron.registry import names
from megatron.tokenizer.build import build_tokenizer


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("prefix", type=path, metavar="PREFIX", help="the pair, as data_path names it")
    add("--tokenizer-type", choices=names("tokenizer"), help="with it, ids are checked and documents shown")
    add("--vocab-file", "--vocab", type=path, metavar="FILE")
    add("--merge-file", type=path, metavar="FILE")
    add("--end-of-document-token", metavar="TOKEN")
    add("--documents", type=int, nargs="+", default=[0], metavar="N", help="documents to show, from 0 (0)")
    add("--characters", type=int, default=500, metavar="N", help="of each, at most (500)")
    return parser.parse_args(with_dashes(arguments))


def run(arguments: Namespace) -> None:
    """Print what is there, then what is wrong with it."""
    dataset = IndexedDataset(arguments.prefix)
    tokenizer = None
    if arguments.tokenizer_type:
        tokenizer = build_tokenizer(
            arguments.tokenizer_type, arguments.vocab_file, arguments.merge_file, arguments.end_of_document_token
        )
    print(describe_pair(dataset.prefix))
    found = list(problems(dataset, tokenizer))
    if found:
        raise RunError("\n".join(found))
    print("\n".join(describe(dataset, tokenizer.end_of_document if tokenizer else None)))
    for number in arguments.documents if tokenizer else []:
        if not 0 <= number < len(dataset):
            raise UserError(f"document {number:,} is not there; the documents are 0 to {len(dataset) - 1:,}")
        print("\n".join(show(dataset, number, tokenizer, arguments.characters)))
    print("nothing is wrong with it")


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
