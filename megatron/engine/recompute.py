"""Activation recomputation: how blocks are recomputed in the backward pass, and where their inputs are stored.

Results do not depend on it: recomputation draws the same random numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megatron.config.plan import EnginePlan
from megatron.parallel.grid import ParallelGrid

Checkpoint = Callable[..., Any]  # (function, *inputs) -> function(*inputs); only the inputs are stored
recompute_all: Checkpoint = partial(checkpoint, use_reentrant=False)

# Expensive operations, whose results are stored: attention kernels, and matrix products except plain attention's (bmm).
_STORED = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def checkpoint_function(plan: EnginePlan, grid: ParallelGrid) -> Checkpoint:
    """The function that runs a group of recomputed blocks as `plan` requires."""
    run = recompute_all
    if plan.recompute_selective:
        run = partial(
            checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _STORED)
        )
    # with sequence parallelism the inputs are partitioned already
    partitioned = plan.partition_activations and grid.size("tensor") > 1 and not grid.sequence_parallel
    if not (partitioned or plan.checkpoint_in_cpu):
        return run
    storage = _Storage(grid if partitioned else None, plan.checkpoint_in_cpu)

    def run_and_store(function: Callable[..., Any], *inputs: Any) -> Any:
        # these hooks see the inputs only; checkpoint's own hooks drop what `function` saves
        with saved_tensors_hooks(storage.pack, storage.unpack):
            return run(function, *inputs)

    return run_and_store


class _Storage:
    """Hooks that store a tensor partitioned over the tensor-parallel group, in host memory, or both."""

    def __init__(self, grid: ParallelGrid | None, in_cpu: bool) -> None:
        """grid: None: do not partition."""
        self.grid, self.in_cpu = grid, in_cpu

    def pack(self, tensor: Tensor) -> tuple[Tensor, torch.Size, torch.device, bool]:
        """The stored part, and what `unpack` needs: shape, device, whether it is partitioned."""
        kept, ranks = tensor.detach(), self.grid.size("tensor") if self.grid else 1
        partitioned = self.grid is not None and tensor.is_floating_point() and tensor.numel() % ranks == 0
        if partitioned and self.grid is not None:
            kept = kept.reshape(ranks, -1)[self.grid.rank("tensor")].clone()
        if self.in_cpu:
            on_host = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
            kept = on_host.copy_(kept, non_blocking=kept.is_cuda)
        return kept, tensor.shape, tensor.device, partitioned

    def unpack(self, stored: tuple[Tensor, torch.Size, torch.device, bool]) -> Tensor:
        """The original tensor. One all-gather if it was partitioned; all ranks of the group unpack in one order."""
        kept, shape, device, partitioned = stored
        kept = kept.to(device, non_blocking=True)
        if partitioned and self.grid is not None:
            whole = kept.new_empty(shape.numel())
            dist.all_gather_into_tensor(whole, kept, group=self.grid.group("tensor"))
            kept = whole
        return kept.view(shape)
