"""Matrices that are cut over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, i input width, o output width, tp ranks of the group.
A column-parallel layer followed by a row-parallel one costs one all-reduce forward and one backward (Megatron-LM,
https://arxiv.org/abs/1909.08053).
Floor 2.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.collectives import copy_to_group, reduce_from_group
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import Initialiser, new_parameter


def zeros(tensor: Tensor, _: torch.Generator) -> None:
    """Initialise with zeros."""
    tensor.zero_()


class ColumnParallelLinear(nn.Module):
    """A linear layer whose outputs are cut: each rank computes o/tp of them."""

    def __init__(self, inputs: int, outputs: int, bias: bool, initialise: Initialiser, grid: ParallelGrid) -> None:
        super().__init__()
        self.group = grid.group("model")
        self.weight = new_parameter((outputs, inputs), 0, initialise, grid)
        self.bias = new_parameter((outputs,), 0, zeros, grid) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, s, i], the same on every rank -> [b, s, o/tp]. One all-reduce backward."""
        return self.local(copy_to_group(inputs, self.group))

    def local(self, inputs: Tensor) -> Tensor:
        """The same for `inputs` that went through `copy_to_group` already: layers that share them share its cost."""
        return F.linear(inputs, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are cut: each rank has i/tp of them."""

    def __init__(self, inputs: int, outputs: int, bias: bool, initialise: Initialiser, grid: ParallelGrid) -> None:
        super().__init__()
        self.group = grid.group("model")
        self.weight = new_parameter((outputs, inputs), 1, initialise, grid)
        self.bias = new_parameter((outputs,), None, zeros, grid) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, s, i/tp] -> [b, s, o], the same on every rank. One all-reduce forward."""
        return row_parallel_sum((self, inputs))


def row_parallel_sum(*branches: tuple[RowParallelLinear, Tensor]) -> Tensor:
    """The sum of several row-parallel layers, each of its own inputs [b, s, i/tp] -> [b, s, o].

    One all-reduce forward for all of them. The biases are added once, after it, as one sum: torch 2.13's inductor
    cannot compile the backward of two bf16 biases that get the same gradient.
    """
    partial = sum_of([F.linear(inputs, layer.weight) for layer, inputs in branches])
    whole = reduce_from_group(partial, branches[0][0].group)
    biases = [layer.bias for layer, _ in branches if layer.bias is not None]
    return whole + sum_of(biases) if biases else whole


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Add up at least one tensor, without the zero that `sum` starts from."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


class VocabParallelEmbedding(nn.Module):
    """A table of token vectors whose rows are cut over the group, for input and, when tied, for output too.

    vocab_size: true rows; padded_size: rows in memory, divisible by tp. Rows beyond vocab_size are zero, get no
    gradient, and their logits are -inf.
    """

    padding_logits: Tensor | None

    def __init__(
        self, vocab_size: int, padded_size: int, hidden_size: int, initialise: Initialiser, grid: ParallelGrid
    ) -> None:
        super().__init__()
        self.group = grid.group("model")
        self.weight = new_parameter((vocab_size, hidden_size), 0, initialise, grid, padded_size)
        rows = padded_size // grid.size("model")
        self.start = grid.rank("model") * rows
        # added to the logits where this rank has padding rows: 0 for true rows, -inf for padding
        beyond = torch.arange(self.start, self.start + rows, device=grid.device) >= vocab_size
        logits = torch.zeros(rows, device=grid.device).masked_fill(beyond, float("-inf"))
        self.register_buffer("padding_logits", logits if bool(beyond.any()) else None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] int64 -> [b, s, h], the same on every rank. One all-reduce forward."""
        rows = self.weight.shape[0]
        if dist.get_world_size(self.group) == 1:
            return F.embedding(tokens, self.weight)
        row = tokens - self.start
        elsewhere = (row < 0) | (row >= rows)
        vectors = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return reduce_from_group(vectors.masked_fill(elsewhere.unsqueeze(-1), 0), self.group)

    def logits(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, padded_size/tp], padding columns -inf. One all-reduce backward."""
        padding = None if self.padding_logits is None else self.padding_logits.to(hidden.dtype)
        return F.linear(copy_to_group(hidden, self.group), self.weight, padding)
