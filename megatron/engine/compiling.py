"""torch.compile for the blocks and the loss, which fuses the operations between matrix products.

Each block is compiled separately, without graph breaks, and blocks of one shape share the code; of the loss, the
operations on the logits of a chunk. Embedding and final norm are not: at their simplest they are a lookup and a norm,
one operation each. Full recomputation, pipelines and DeepSpeed's hooks stay outside the compiled code; selective
recomputation is part of it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron.engine.recompute import Checkpoint
from megatron.errors import UserError
from megatron.model.layer import Layer
from megatron.parallel.cross_entropy import EAGER, Kernels
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import VocabParallelEmbedding


def compiled(function: Callable[..., Any], async_tensor_parallel: bool = False) -> Callable[..., Any]:
    """`function`, compiled at its first call for each shape. Dropout masks are the same as without compilation."""
    options: dict[str, Any] = {"fallback_random": True, "_micro_pipeline_tp": async_tensor_parallel}
    return torch.compile(function, dynamic=False, options=options)


def compiled_layers(
    layers: list[Layer], checkpoint: Checkpoint | None = None, async_tensor_parallel: bool = False
) -> list[Layer]:
    """The same layers; blocks and the loss are compiled when they are built.

    checkpoint: recomputes a block's activations within the compiled code, so that it sees the block's operations.
    async_tensor_parallel: fuse collectives and matrix products; needs `share_memory`.
    """
    return [replace(layer, build=partial(_build, layer, checkpoint, async_tensor_parallel)) for layer in layers]


def share_memory(grid: ParallelGrid) -> None:
    """Let the GPUs of a tensor-parallel group access each other's memory, as async_tensor_parallel does. Collective.

    Raises UserError on a CPU.
    """
    if grid.device.type != "cuda":
        raise UserError(
            "async_tensor_parallel (true) needs GPUs that access each other's memory (NVLink), and this is a CPU; "
            "leave async_tensor_parallel out"
        )
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(grid.group("tensor").group_name)


def _build(layer: Layer, checkpoint: Checkpoint | None, async_tensor_parallel: bool) -> nn.Module:
    module = layer.build()
    if layer.recompute:
        forward = module.forward
        module.forward = compiled(partial(checkpoint, forward) if checkpoint else forward, async_tensor_parallel)
    if isinstance(module, VocabParallelEmbedding):
        module.loss_kernels = Kernels(*(compiled(kernel) for kernel in EAGER))
    return module


def gather_whole_blocks(deepspeed: Any, module: nn.Module, layers: list[Layer]) -> None:
    """Make ZeRO 3 gather the weights of a block before its compiled code runs, instead of in the middle of it."""
    deepspeed.utils.set_z3_leaf_modules(module, list({layer.module_class for layer in layers if layer.recompute}))
