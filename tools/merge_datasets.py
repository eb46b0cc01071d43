"""Join pairs of token files into one: the shards of an array job, or several corpora.

    python tools/merge_datasets.py --input data/part*_text_document.idx --output-prefix data/all_text_document
    python tools/merge_datasets.py --input data/all_text_document --output-prefix data/mixed --shuffle 1234

Documents keep their order, part after part: shards 0/n .. n-1/n of one job give, byte for byte, what one run without
--shard gives. With --shuffle SEED they come in a random order, in memory that does not grow with the data.
"""

import re
import sys
from argparse import Namespace
from collections.abc import Sequence

from megatron.data.indexed import DEFAULT_KEY_SUFFIX
from megatron.data.manifest import read_manifest, write_manifest
from megatron.errors import exit_code
from megatron.preprocessing.commands import describe_pair, new_parser, output_locked, path, prefix, with_dashes
from megatron.preprocessing.merge import merge, merge_shuffled, open_parts
from megatron.progress import Progress
from megatron.terminal import live


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    help_of_input = "prefixes of the pairs, in this order; with or without .bin or .idx"
    add("--input", type=path, required=True, nargs="+", metavar="PREFIX", help=help_of_input)
    add("--output-prefix", type=prefix, required=True, metavar="PREFIX", help="PREFIX.bin and PREFIX.idx are written")
    add("--shuffle", type=int, metavar="SEED", help="put the documents in a random order")
    return parser.parse_args(with_dashes(arguments))


@live()
def run(arguments: Namespace) -> None:
    """Keep other runs from the output while it is written."""
    with output_locked(arguments.output_prefix):
        join(arguments)


def join(arguments: Namespace) -> None:
    """Check the parts, join them, and list in a manifest what was joined."""
    prefixes = dict.fromkeys(re.sub(r"\.(bin|idx)$", "", name) for name in arguments.input)
    parts = open_parts(list(prefixes))
    tokens = sum(part.num_tokens for part in parts)
    with Progress("merging", tokens, "tokens") as progress:

        def show(done: int) -> None:
            progress.add(done - progress.done)

        if arguments.shuffle is None:
            merge(parts, arguments.output_prefix, show)
        else:
            merge_shuffled(parts, arguments.output_prefix, arguments.shuffle, show)
    outputs = [arguments.output_prefix + ending for ending in (".bin", ".idx")]
    counts = {"documents": sum(map(len, parts)), "tokens": tokens}
    sources = [
        {"prefix": part.prefix, "documents": len(part), "tokens": part.num_tokens, "manifest": manifest_of(part.prefix)}
        for part in parts
    ]
    write_manifest(arguments.output_prefix, outputs, merged=sources, shuffle=arguments.shuffle, counts=counts)
    print(describe_pair(arguments.output_prefix))


def manifest_of(prefix: str) -> object:
    """The manifest of a part, if there is one."""
    return read_manifest(prefix) or read_manifest(prefix.removesuffix(DEFAULT_KEY_SUFFIX))


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
