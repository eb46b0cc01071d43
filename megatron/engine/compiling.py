"""Blocks and the loss through torch.compile, which fuses what stands between their matrix products.

Each block is compiled for itself, and blocks of one shape share the result: recomputation, pipelines and the hooks of
DeepSpeed stay outside of it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron.model.layer import Layer


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call for every shape it meets. Dropout draws what it draws without."""
    return torch.compile(function, dynamic=False, options={"fallback_random": True})


def compiled_blocks(layers: list[Layer]) -> list[Layer]:
    """The same layers, of which the blocks compile themselves."""
    return [replace(layer, build=partial(_build, layer.build)) if layer.recompute else layer for layer in layers]


def _build(build: Callable[[], nn.Module]) -> nn.Module:
    module = build()
    module.forward = compiled(module.forward)
    return module
