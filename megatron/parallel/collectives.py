"""Collectives over a process group that gradients can pass through.

With one rank in the group each is the identity and costs nothing.
Floor 2.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def copy_to_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Hand a tensor that all ranks have alike to computations that differ by rank.

    Identity forward; one all-reduce backward, which sums what the ranks' computations say about it.
    """
    return tensor if dist.get_world_size(group) == 1 else _CopyToGroup.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results. One all-reduce forward; identity backward."""
    return tensor if dist.get_world_size(group) == 1 else _ReduceFromGroup.apply(tensor, group)


def gather_from_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' slices along the last dimension, the same on every rank.

    One all-gather forward; backward keeps this rank's slice, with no communication.
    """
    return tensor if dist.get_world_size(group) == 1 else _GatherFromGroup.apply(tensor, group)


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(gradient, ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduced(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _GatherFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.width = group, tensor.shape[-1]
        parts = [tensor.new_empty(tensor.shape) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, dist.get_rank(ctx.group) * ctx.width, ctx.width), None


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed
