"""torch.compile for the blocks and the loss, which fuses the operations between matrix products.

Each block is compiled separately, and blocks of one shape share the code. Recomputation, pipelines and DeepSpeed's
hooks stay outside the compiled code.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron.model.layer import Layer


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call for each shape. Dropout masks are the same as without compilation."""
    return torch.compile(function, dynamic=False, options={"fallback_random": True})


def compiled_blocks(layers: list[Layer]) -> list[Layer]:
    """The same layers, with blocks that are compiled when they are built."""
    return [replace(layer, build=partial(_build, layer.build)) if layer.recompute else layer for layer in layers]


def _build(build: Callable[[], nn.Module]) -> nn.Module:
    module = build()
    module.forward = compiled(module.forward)
    return module
