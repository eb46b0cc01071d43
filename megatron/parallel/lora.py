"""Low-rank adapters of linear layers (LoRA, https://arxiv.org/abs/2106.09685): W x + factor * B A x, with W frozen.

Shapes: b micro-batch, s sequence, i input width, o output width, r rank of the adapter, tp ranks of the group.
A is drawn as a linear layer's weight is in torch (Kaiming uniform, within 1 / sqrt(i)), B is zero. Under tensor
parallelism the matrix between r and the sharded dimension is sharded with it, and the other one is replicated.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.collectives import copy_to_group, gather_sequence
from megatron.parallel.column_exchange import ColumnExchange
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.initial_values import Independent, zeros
from megatron.parallel.layers import replicated_parameter
from megatron.parallel.parameter import new_parameter
from megatron.parallel.random import dropout, own_stream


class ColumnAdapter(nn.Module):
    """Of a layer with sharded outputs: A [r, i] is replicated, B [o/tp, r] sharded."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        factor: float,
        dropout: float,
        grid: ParallelGrid,
        exchange: ColumnExchange | None = None,
    ) -> None:
        """exchange: of the layer's outputs, here of the rows of B."""
        super().__init__()
        self.grid, self.factor, self.dropout, self.exchange = grid, factor, dropout, exchange
        self.a = new_parameter((rank, inputs), None, _kaiming(inputs), grid)
        self.b = new_parameter((outputs, rank), 0, zeros, grid)

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, s, i] or [b, s/tp, i] -> [b, s, o/tp], to add to the layer's outputs.

        One all-reduce of [b, s, r] backward; with sequence parallelism one all-gather forward and one reduce-scatter
        backward instead, and an all-reduce of the gradient of A.
        """
        inputs = dropout(inputs, self.dropout, self.training, self.grid)
        low, group = F.linear(inputs, replicated_parameter(self.a, self.grid)), self.grid.group("tensor")
        low = gather_sequence(low, group) if self.grid.sequence_parallel else copy_to_group(low, group)
        b = self.b if self.exchange is None else self.exchange(self.b.t()).t()
        return F.linear(low, b) * self.factor


class RowAdapter(nn.Module):
    """Of a layer with sharded inputs: A [r, i/tp] is sharded, B [o, r] replicated."""

    def __init__(self, inputs: int, outputs: int, rank: int, factor: float, dropout: float, grid: ParallelGrid) -> None:
        super().__init__()
        self.grid, self.factor, self.dropout = grid, factor, dropout
        self.a = new_parameter((rank, inputs), 1, _kaiming(inputs), grid)
        self.b = new_parameter((outputs, rank), None, zeros, grid)

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, s, i/tp] -> this rank's summand of the outputs [b, s, o].

        One all-reduce of the gradient of B backward.
        """
        if self.training and self.dropout:
            with own_stream(self.grid):
                inputs = F.dropout(inputs, self.dropout)
        low = F.linear(inputs, self.a)
        return F.linear(low, copy_to_group(self.b, self.grid.group("tensor"))) * self.factor


class HeadsAdapter(nn.Module):
    """Of the fused query-key-value layer, with an adapter of its own for any of queries, keys and values.

    The rows of each B are the heads in order, as they are in layers that are not fused.
    """

    def __init__(self, parts: Mapping[str, nn.Module], queries_per_key: int, head_size: int) -> None:
        """parts: adapters of "query", "key" and "value", of those that have one."""
        super().__init__()
        self.head_size = head_size
        self.heads = {"query": queries_per_key, "key": 1, "value": 1}  # for each key/value head, in the fused order
        for name, adapter in parts.items():
            self.add_module(name, adapter)

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, s, i] or [b, s/tp, i] -> [b, s, o/tp], ordered by key/value head; zero where there is no adapter."""
        found = {
            name: self.get_submodule(name)(inputs).unflatten(-1, (-1, heads, self.head_size))
            for name, heads in self.heads.items()
            if hasattr(self, name)
        }
        some = next(iter(found.values()))
        parts = [
            found[name] if name in found else some.new_zeros(*some.shape[:-2], heads, self.head_size)
            for name, heads in self.heads.items()
        ]
        return torch.cat(parts, dim=-2).flatten(-3)


def _kaiming(inputs: int) -> Independent:
    bound = 1 / math.sqrt(inputs)

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return Independent(fill)
