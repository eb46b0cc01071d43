r"""Write a checkpoint as a model of Hugging Face, and check that both compute the same.

    python tools/convert_to_hf.py --load checkpoints/my --output my-model
    python tools/convert_to_hf.py --load checkpoints/my --iteration 1000 --output my-model --dtype bf16
    python tools/convert_to_hf.py --load checkpoints/my --output my-model vocab_file=tokenizer.json

The folder loads with transformers' AutoModelForCausalLM and AutoTokenizer. A checkpoint that holds low-rank adapters
becomes an adapter folder of PEFT, which PeftModel.from_pretrained loads over the model that they adapt. Words of the
form key=value replace keys of the run, such as the path of the tokenizer. One tensor is in memory at a time.

Exit code: 0; 1 when writing failed or the two sides differ, with nothing left behind; 2 when the input is wrong.
"""

import re
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron import registry
from megatron.config.load import OVERRIDE
from megatron.config.yaml_file import normal_key, parse_value
from megatron.convert.family import KIND
from megatron.errors import UserError, exit_code
from megatron.hugging_face.adapters import export_adapters
from megatron.hugging_face.memory import return_freed_tensors
from megatron.hugging_face.outgoing import LARGEST, export_model, open_checkpoint, plan_export
from megatron.preprocessing.commands import new_parser
from megatron.terminal import live

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes from "5GB" or "300MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", text.upper())
    if match is None or not float(match[1]):
        raise ArgumentTypeError(f'"{text}" is no size such as 5GB or 300MiB')
    return int(float(match[1]) * UNITS[match[2]])


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="the folder of the run's checkpoints")
    add("--iteration", type=int, metavar="STEP", help="the step of the checkpoint (default: the latest)")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (default: fp32, lossless)")
    add("--max-shard-size", type=size, default=LARGEST, metavar="SIZE", help="of a file of weights (default: 5GB)")
    add("--family", choices=registry.names(KIND), metavar="NAME", help="the architecture, if several hold the model")
    add("--no-check", action="store_true", help="do not compare the logits of both sides")
    add("overrides", nargs="*", default=[], metavar="key=value", help="keys to replace")
    return parser.parse_intermixed_args(arguments)


def changes(words: Sequence[str]) -> dict[str, Any]:
    """The keys that words of the form key=value replace. Raises UserError."""
    found = {}
    for word in words:
        match = OVERRIDE.fullmatch(word)
        if match is None:
            raise UserError(f'"{word}" is not of the form key=value')
        try:
            found[normal_key(match[1])] = parse_value(match[2])
        except ValueError as error:
            raise UserError(f'the value in "{word}" is not YAML: {error}') from error
    return found


@live()
def run(arguments: Namespace) -> None:
    """Convert, and print what was written."""
    return_freed_tensors()
    trained = open_checkpoint(arguments.load, arguments.iteration, changes(arguments.overrides))
    if trained.model.lora is not None:
        export_adapters(trained, arguments.output, arguments.dtype, arguments.family)
        return
    export = plan_export(trained.model, trained.vocab_file, trained.tokenizer, arguments.dtype, arguments.family)
    export_model(trained, export, arguments.output, arguments.max_shard_size, not arguments.no_check)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
