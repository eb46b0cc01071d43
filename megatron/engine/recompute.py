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
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from megatron.config.plan import EnginePlan
from megatron.parallel.grid import ParallelGrid

Checkpoint = Callable[..., Any]  # (function, *inputs) -> function(*inputs); only the inputs are stored
recompute_all: Checkpoint = partial(checkpoint, use_reentrant=False)

# Expensive operations, whose results are stored: attention kernels, and matrix products except plain attention's (bmm).
# By name, because the packages register theirs when they are imported, and higher-order operators have no overloads.
_STORED = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "deepy::composed_attention",
    "flash_attn::_flash_attn_forward",  # flash-attn 2.7 and later
    "flash_attn_3::_flash_attn_forward",  # FlashAttention-3: its operator, or in older versions its kernel
    "flash_attn_3::fwd",
    "flex_attention",
    "inductor_compiled_code",  # FlexAttention, compiled: nothing else is where operations are selected
}


def _policy(_: SelectiveCheckpointContext, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation.name() in _STORED else CheckpointPolicy.PREFER_RECOMPUTE


def _policy_of_compiled_code(
    context: SelectiveCheckpointContext, operation: Any, *_: Any, **__: Any
) -> CheckpointPolicy:
    """Store random numbers too: compiled code does not restore the generators when it recomputes."""
    random = torch.Tag.nondeterministic_seeded in getattr(operation, "tags", ())
    return CheckpointPolicy.MUST_SAVE if random else _policy(context, operation)


def checkpoint_function(plan: EnginePlan, grid: ParallelGrid) -> Checkpoint:
    """The function that runs a group of recomputed blocks as `plan` requires."""
    run = recompute_all
    if plan.recompute_selective:
        policy = _policy_of_compiled_code if plan.compile else _policy
        run = partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))
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
    """Hooks that store a tensor partitioned over the tensor-parallel group, in host memory, or both.

    Integers (what masks attention) stay as they are: all blocks share them.
    """

    def __init__(self, grid: ParallelGrid | None, in_cpu: bool) -> None:
        """grid: None: do not partition."""
        self.grid, self.in_cpu = grid, in_cpu

    def pack(self, tensor: Tensor) -> tuple[Tensor, torch.Size, torch.device, bool]:
        """The stored part, and what `unpack` needs: shape, device, whether it is partitioned."""
        if not tensor.is_floating_point():
            return tensor.detach(), tensor.shape, tensor.device, False
        kept, ranks = tensor.detach(), self.grid.size("tensor") if self.grid else 1
        partitioned = self.grid is not None and tensor.numel() % ranks == 0
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
