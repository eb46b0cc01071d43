"""Differentiable collectives over a process group.

Shapes: b micro-batch, s sequence, p ranks of the group.
In a group of one rank each function returns its input.
The collectives are torch's functional ones, which torch.compile records in its graph and can fuse with matrix products.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_functional = torch.ops._c10d_functional


def copy_to_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Use a replicated tensor in computations that differ by rank.

    Identity forward; one all-reduce of the gradient backward.
    """
    return tensor if group.size() == 1 else _CopyToGroup.apply(tensor, group)


def reduce_from_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results. One all-reduce forward; identity backward."""
    return tensor if group.size() == 1 else _ReduceFromGroup.apply(tensor, group)


def gather_from_group(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' slices along the last dimension, on every rank.

    One all-gather forward; backward keeps this rank's slice without communication.
    """
    return tensor if group.size() == 1 else _GatherFromGroup.apply(tensor, group)


def gather_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather a sharded sequence for computations that differ by rank: [b, s/p, ...] -> [b, s, ...].

    One all-gather forward; one reduce-scatter of the gradient backward.
    """
    return tensor if group.size() == 1 else _GatherSequence.apply(tensor, group)


def scatter_sequence(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' partial results and keep this rank's part of the sequence: [b, s, ...] -> [b, s/p, ...].

    One reduce-scatter forward; one all-gather backward.
    """
    return tensor if group.size() == 1 else _ScatterSequence.apply(tensor, group)


def exchange(tensor: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """Split `tensor` along dimension `split` over the ranks, and concatenate the received parts along `join`.

    One all-to-all forward and its inverse backward (https://arxiv.org/abs/2309.14509).
    """
    return tensor if group.size() == 1 else _Exchange.apply(tensor, split, join, group)


def exchange_rows(tensor: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the first `sent[0]` rows of `tensor` to the first rank, the next ones to the second, and so on.

    Returns the `received[i]` rows from each rank, concatenated. One all-to-all forward and its inverse backward.
    """
    return tensor if group.size() == 1 else _ExchangeRows.apply(tensor, sent, received, group)


def all_gather_sequence(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[b, s/p, ...] of each rank -> [b, s, ...] on every rank. Not differentiable."""
    ranks = dist.get_world_size(group)
    parts = _finished(_functional.all_gather_into_tensor(part.contiguous(), ranks, group.group_name))
    return torch.cat(parts.chunk(ranks), dim=1)  # as torch's fusion of gather and matrix product expects it


def reduce_scatter_sequence(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Each rank's summand [b, s, ...] -> this rank's part of the sum, [b, s/p, ...]. Not differentiable."""
    ranks = dist.get_world_size(group)
    parts = torch.cat(whole.chunk(ranks, dim=1))  # as torch's fusion of matrix product and scatter expects it
    return _finished(_functional.reduce_scatter_tensor(parts, "sum", ranks, group.group_name))


def _finished(result: Tensor) -> Tensor:
    """The result of a functional collective, for use on the current stream."""
    finished: Tensor = _functional.wait_tensor(result)
    return finished


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
        ranks = dist.get_world_size(group)
        parts = _finished(_functional.all_gather_into_tensor(tensor.contiguous(), ranks, group.group_name))
        return torch.cat(parts.chunk(ranks), dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(-1, dist.get_rank(ctx.group) * ctx.width, ctx.width), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather_sequence(part, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(gradient, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(whole, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(gradient, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.split, ctx.join, ctx.group = split, join, group
        return _exchanged(tensor, split, join, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, ctx.join, ctx.split, ctx.group), None, None, None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _finished(_functional.all_to_all_single(tensor, received, sent, group.group_name))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rows = _functional.all_to_all_single(gradient.contiguous(), ctx.sent, ctx.received, ctx.group.group_name)
        return _finished(rows), None, None, None


def _exchanged(tensor: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
    ranks = dist.get_world_size(group)
    parts = torch.cat(tensor.chunk(ranks, split))
    rows = [parts.shape[0] // ranks] * ranks
    received = _finished(_functional.all_to_all_single(parts, rows, rows, group.group_name))
    return torch.cat(received.chunk(ranks), join)


def _all_reduced(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _finished(_functional.all_reduce(tensor.contiguous(), "sum", group.group_name))
