r"""Convert a model of LitGPT (lit_model.pth with its model_config.yaml) into a checkpoint of ours.

    python tools/convert_from_litgpt.py --input checkpoints/EleutherAI/pythia-160m --output converted
    python deepy.py generate.py converted/model.yml text_gen_type=interactive

The tokenizer is the tokenizer.json or tokenizer.model of the folder; words of the form key=value replace it and other
keys. OUTPUT/global_step0 holds the weights, in fp32 and without an optimizer's state, for any layout; OUTPUT/model.yml
the keys of the model, its tokenizer, and `load`. Nothing that a file could make Python run is run.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.converted import write_model
from megatron.config.resolve import resolve
from megatron.convert.litgpt import read_config, stored_parameters
from megatron.errors import exit_code
from megatron.hugging_face.memory import return_freed_tensors
from megatron.preprocessing.commands import new_parser
from megatron.resources import open_tokenizer
from megatron.terminal import live


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="the folder with lit_model.pth")
    add("--output", type=Path, required=True, metavar="DIR", help="a folder for the checkpoint, without others in it")
    add("overrides", nargs="*", default=[], metavar="key=value", help="keys to replace")
    return parser.parse_intermixed_args(arguments)


@live()
def run(arguments: Namespace) -> None:
    """Convert, and print what was written."""
    return_freed_tensors()
    config = read_config(arguments.input, arguments.overrides)
    model = resolve(config, 1, open_tokenizer(config).vocab_size).model
    print(write_model(arguments.output, stored_parameters(arguments.input, model), config))


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
