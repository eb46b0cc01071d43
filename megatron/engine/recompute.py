"""How blocks are computed again in the backward pass, and where their inputs wait for it.

Numbers do not depend on any of it: what is computed again draws the same random numbers.
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

Checkpoint = Callable[..., Any]  # (function, *inputs) -> function(*inputs), of which the inputs alone are kept
recompute_all: Checkpoint = partial(checkpoint, use_reentrant=False)

# What is dear to compute again: matrix products, but not those of plain attention, and the kernels of attention.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def checkpoint_function(plan: EnginePlan, grid: ParallelGrid) -> Checkpoint:
    """What runs a group of blocks that is to be computed again, as `plan` has it."""
    run = recompute_all
    if plan.recompute_selective:
        run = partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _KEPT))
    # with sequence parallelism the inputs are parts already
    partitioned = plan.partition_activations and grid.size("tensor") > 1 and not grid.sequence_parallel
    if not (partitioned or plan.checkpoint_in_cpu):
        return run
    stored = _Stored(grid if partitioned else None, plan.checkpoint_in_cpu)

    def run_and_store(function: Callable[..., Any], *inputs: Any) -> Any:
        # the inputs are saved under these hooks; what `function` saves goes through checkpoint's own, which drop it
        with saved_tensors_hooks(stored.pack, stored.unpack):
            return run(function, *inputs)

    return run_and_store


class _Stored:
    """Hooks that keep a tensor in parts over the tensor-parallel group, in host memory, or both."""

    def __init__(self, grid: ParallelGrid | None, in_cpu: bool) -> None:
        """grid: None where tensors are kept whole."""
        self.grid, self.in_cpu = grid, in_cpu

    def pack(self, tensor: Tensor) -> tuple[Tensor, torch.Size, torch.device, bool]:
        """The part to keep, and what is needed to make the tensor of it again."""
        kept, ranks = tensor.detach(), self.grid.size("tensor") if self.grid else 1
        cut = self.grid is not None and tensor.is_floating_point() and tensor.numel() % ranks == 0
        if cut and self.grid is not None:
            kept = kept.reshape(ranks, -1)[self.grid.rank("tensor")].clone()
        if self.in_cpu:
            on_host = torch.empty(kept.shape, dtype=kept.dtype, device="cpu", pin_memory=kept.is_cuda)
            kept = on_host.copy_(kept, non_blocking=kept.is_cuda)
        return kept, tensor.shape, tensor.device, cut

    def unpack(self, stored: tuple[Tensor, torch.Size, torch.device, bool]) -> Tensor:
        """The tensor as it was. One all-gather where it was cut; the ranks of the group come here in one order."""
        kept, shape, device, cut = stored
        kept = kept.to(device, non_blocking=True)
        if cut and self.grid is not None:
            whole = kept.new_empty(shape.numel())
            dist.all_gather_into_tensor(whole, kept, group=self.grid.group("tensor"))
            kept = whole
        return kept.view(shape)
