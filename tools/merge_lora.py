r"""Merge LoRA adapters into their base: a checkpoint of a whole model, without adapters.

    python tools/merge_lora.py --load checkpoints/adapters --output checkpoints/merged

The checkpoint is loaded like any other, without the keys lora and freeze: by train.py with finetune, generate.py,
evaluate.py and tools/convert_to_hf.py. One tensor is in memory at a time. docs/lora.md describes adapters.

Exit code: 0; 1 when writing failed, with nothing left behind; 2 when the input is wrong.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.converted import checkpoint_weights, write_converted
from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.merge import merged_weights
from megatron.checkpoint.store import checkpoint_config
from megatron.config.resolve import resolve
from megatron.errors import UserError, exit_code
from megatron.hugging_face.adapters import base_weights
from megatron.preprocessing.commands import new_parser
from megatron.progress import Progress
from megatron.resources import written_config
from megatron.terminal import live


def parse(arguments: Sequence[str]) -> Namespace:
    """The flags."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="the folder of the checkpoints with adapters")
    add("--iteration", type=int, metavar="STEP", help="the step of the checkpoint (default: the latest)")
    add("--base", metavar="DIR", help="the folder of the base's checkpoints, or hf:MODEL, if it has moved")
    add("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser.parse_args(arguments)


@live()
def run(arguments: Namespace) -> None:
    """Merge, and print what was written."""
    checkpoint = find_checkpoint(arguments.load, arguments.iteration)
    if checkpoint is None:
        raise UserError(f"there is no checkpoint in {arguments.load}")
    flat = checkpoint_config(checkpoint)
    config = written_config(flat, str(checkpoint / "config.json"))
    # the shapes of adapters do not depend on the vocabulary
    model = resolve(config, config.parallelism.model_parallel_size, config.model.vocab_size or 1, inference=True).model
    if model.lora is None:
        raise UserError(f"{checkpoint} holds no adapters: its configuration has no lora")
    merged = {key: value for key, value in flat.items() if key not in ("lora", "freeze")}
    weights = merged_weights(base_weights(checkpoint, arguments.base), checkpoint_weights(checkpoint), model)
    with Progress(f"writing {arguments.output}", len(weights), "tensors") as progress:
        path = write_converted(arguments.output, weights, merged, progress.add)
    print(f"{path}: the model of {checkpoint}, with its adapters merged")


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    sys.exit(exit_code(lambda: run(options)))
