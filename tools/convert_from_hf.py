r"""Convert a model of Hugging Face into a checkpoint of ours, and check that both compute the same.

    python tools/convert_from_hf.py --model EleutherAI/pythia-160m --output pythia
    python tools/convert_from_hf.py --model path/to/folder --yaml > model.yml
    python tools/convert_from_hf.py --model path/to/adapters --base pythia --output adapted
    python deepy.py generate.py pythia/model.yml text_gen_type=interactive
    python deepy.py train.py pythia/model.yml my_training.yml

--model is a folder or a name on the hub (HF_HUB_OFFLINE=1: only what is in the cache). OUTPUT/global_step0 holds the
weights, in fp32 and without an optimizer's state, for any layout; OUTPUT/model.yml the keys of the model, of its
tokenizer, and `load`; OUTPUT/hugging_face the tokenizer, the chat template and the settings of generation. One tensor
is in memory at a time. With --base, --model is a folder of PEFT's low-rank adapters for the model in --base, a folder
of our checkpoints, which remains their base. Nothing that a file could make Python run is run.

Exit code: 0; 1 when writing failed or the two sides differ, with nothing left behind; 2 when the input is wrong.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.config.yaml_file import yaml_text
from megatron.errors import UserError, exit_code
from megatron.hugging_face.adapters import import_adapters
from megatron.hugging_face.incoming import import_model
from megatron.hugging_face.memory import return_freed_tensors
from megatron.hugging_face.published import configuration_keys, open_published
from megatron.preprocessing.commands import new_parser
from megatron.terminal import live


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR_OR_NAME", help="a folder, or a name on the Hugging Face hub")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, metavar="DIR", help="a new folder")
    what.add_argument("--yaml", action="store_true", help="print our configuration of the model, and write nothing")
    add("--base", type=Path, metavar="DIR", help="--model is a folder of adapters for the checkpoint in this folder")
    add("--no-check", action="store_true", help="do not compare the logits of both sides")
    return parser.parse_args(arguments)


@live()
def run(arguments: Namespace) -> None:
    """Convert, and print what was written."""
    return_freed_tensors()
    if arguments.base is not None:
        if arguments.output is None:
            raise UserError("--base needs --output, the folder of the adapters' checkpoint")
        import_adapters(Path(arguments.model), arguments.base, arguments.output)
    elif arguments.yaml:
        print(yaml_text(configuration_keys(arguments.model)), end="")
    else:
        import_model(open_published(arguments.model), arguments.output, check=not arguments.no_check)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
