"""torch.compile for the blocks and the loss, which fuses the operations between matrix products.

Each block is compiled separately, without graph breaks, and blocks of one shape share the code. Full recomputation,
pipelines and DeepSpeed's hooks stay outside the compiled code; selective recomputation is part of it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron.engine.recompute import Checkpoint
from megatron.model.layer import Layer


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call for each shape. Dropout masks are the same as without compilation."""
    return torch.compile(function, dynamic=False, options={"fallback_random": True})


def compiled_blocks(layers: list[Layer], checkpoint: Checkpoint | None = None) -> list[Layer]:
    """The same layers, with blocks that are compiled when they are built.

    checkpoint: recomputes a block's activations within the compiled code, so that it sees the block's operations.
    """
    return [
        replace(layer, build=partial(_build, layer.build, checkpoint)) if layer.recompute else layer for layer in layers
    ]


def _build(build: Callable[[], nn.Module], checkpoint: Checkpoint | None) -> nn.Module:
    module = build()
    forward = module.forward
    module.forward = compiled(partial(checkpoint, forward) if checkpoint else forward)
    return module


def gather_whole_blocks(deepspeed: Any, module: nn.Module, layers: list[Layer]) -> None:
    """Make ZeRO 3 gather the weights of a block before its compiled code runs, instead of in the middle of it."""
    deepspeed.utils.set_z3_leaf_modules(module, list({layer.module_class for layer in layers if layer.recompute}))
