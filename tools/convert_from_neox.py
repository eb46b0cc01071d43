r"""Convert a checkpoint of GPT-NeoX, saved under any layout, into one of ours.

    python tools/convert_from_neox.py --input checkpoints/global_step143000 --output converted
    python tools/convert_from_neox.py --input checkpoints --output converted --config my.yml vocab_file=tokenizer.json
    python deepy.py generate.py converted/model.yml text_gen_type=interactive

The model is described by the YAML files in the step's folder `configs`, or by those of --config. Words of the form
key=value replace keys of theirs, such as the path of the tokenizer, which decides how many rows the vocabulary has.
OUTPUT/global_step0 holds the weights, in fp32 and without an optimizer's state, for any layout; OUTPUT/model.yml the
keys of the model, its tokenizer, and `load`. Weights are those of the model, in the run's precision: the fp32 masters
of DeepSpeed's optimizer files are not read. Grouped queries are read as GPT-NeoX has stored them since November 2024:
all queries of a rank, then its keys, then its values. Nothing that a file could make Python run is run.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.converted import write_model
from megatron.config.resolve import resolve
from megatron.convert.neox_checkpoint import NeoXFiles, find_step, read_config, stored_parameters
from megatron.errors import exit_code
from megatron.hugging_face.memory import return_freed_tensors
from megatron.preprocessing.commands import new_parser
from megatron.resources import open_tokenizer
from megatron.terminal import live


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="DIR", help="a step's folder, or one whose file `latest` names it")
    add("--output", type=Path, required=True, metavar="DIR", help="a folder for the checkpoint, without others in it")
    add("--config", type=Path, action="append", metavar="YAML", help="a file of the run (default: all in DIR/configs)")
    add("overrides", nargs="*", default=[], metavar="key=value", help="keys to replace")
    return parser.parse_intermixed_args(arguments)


@live()
def run(arguments: Namespace) -> None:
    """Convert, and print what was written."""
    return_freed_tensors()
    files = NeoXFiles(find_step(arguments.input))
    config = read_config(files, arguments.config or (), arguments.overrides)
    model = resolve(config, 1, open_tokenizer(config).vocab_size).model
    if model.num_kv_heads < model.num_attention_heads:
        print("grouped queries are read as GPT-NeoX has stored them since November 2024; older ones give nonsense")
    print(write_model(arguments.output, stored_parameters(files, model), config))


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
