"""Linear layers and embeddings sharded over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, i input width, o output width, tp ranks of the group.
A column-parallel layer followed by a row-parallel one costs one all-reduce forward and one backward (Megatron-LM,
https://arxiv.org/abs/1909.08053). With sequence parallelism (https://arxiv.org/abs/2205.05198) hidden
states outside such a pair are [b, s/tp, h]: an all-gather before and a reduce-scatter after it replace the all-reduce,
at the same cost.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron.parallel.collectives import (
    all_gather_sequence,
    copy_to_group,
    gather_sequence,
    reduce_from_group,
    reduce_scatter_sequence,
    scatter_sequence,
)
from megatron.parallel.column_exchange import ColumnExchange
from megatron.parallel.cross_entropy import (
    EAGER,
    UNCHANGED,
    Kernels,
    LogitTransform,
    VocabularyShard,
    linear_cross_entropy,
    transform_logits,
)
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.initial_values import zeros
from megatron.parallel.packed_weights import PackedWeight
from megatron.parallel.parameter import Initialiser, new_parameter
from megatron.parallel.products import gradient_of_inputs, gradient_of_weight, linear


class LinearLayer(nn.Module):
    """A module that multiplies by a weight [o, i], its parameter, or in inference by a packed form of it."""

    weight: nn.Parameter  # may be deleted once it is packed
    packed: PackedWeight | None = None

    @property
    def factor(self) -> Tensor | PackedWeight:
        """What inputs are multiplied by."""
        return self.weight if self.packed is None else self.packed


class ColumnParallelLinear(LinearLayer):
    """A linear layer with sharded outputs: each rank computes o/tp of them."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        initialise: Initialiser,
        grid: ParallelGrid,
        float8: bool = False,
        exchange: ColumnExchange | None = None,
    ) -> None:
        """exchange: if ranks use other outputs than those they compute."""
        super().__init__()
        self.grid, self.float8, self.exchange = grid, float8, exchange
        self.weight = new_parameter((outputs, inputs), 0, initialise, grid)
        self.bias = new_parameter((outputs,), 0, zeros, grid) if bias else None
        self.lora: nn.Module | None = None  # see lora.py

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, s, i], the same on every rank ([b, s/tp, i] with sequence parallelism) -> [b, s, o/tp].

        With `exchange` [b, s, the outputs that this rank wants].
        """
        return column_parallel_layers(inputs, self)[0]


def column_parallel_layers(inputs: Tensor, *layers: ColumnParallelLinear) -> list[Tensor]:
    """Several layers of the same inputs, with their exchanges and adapters; see `column_parallel`."""
    weights = [(layer.factor, layer.bias) for layer in layers]
    outputs = column_parallel(inputs, layers[0].grid, *weights, float8=layers[0].float8)
    pairs = [
        (output if layer.exchange is None else layer.exchange(output), layer.lora)
        for output, layer in zip(outputs, layers, strict=True)
    ]
    return [output if lora is None else output + lora(inputs) for output, lora in pairs]


def column_parallel(
    inputs: Tensor, grid: ParallelGrid, *layers: tuple[Tensor | PackedWeight, Tensor | None], float8: bool = False
) -> list[Tensor]:
    """Several column-parallel layers, each a weight [o/tp, i] and a bias, of the same inputs with shared communication.

    inputs: [b, s, i], the same on every rank; [b, s/tp, i] with sequence parallelism.
    Returns [b, s, o/tp] for each. One all-reduce backward. With sequence parallelism one all-gather forward; an
    all-gather and a reduce-scatter backward, because only this rank's part of the inputs is stored.
    """
    group = grid.group("tensor")
    if grid.sequence_parallel:
        flat = [tensor for layer in layers for tensor in layer]
        return list(_GatheredLinear.apply(inputs, group, float8, *flat))
    inputs = copy_to_group(inputs, group)
    return [linear(inputs, weight, bias, float8) for weight, bias in layers]


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, float8: bool, *flat: Any) -> tuple[Tensor, ...]:
        ctx.group, ctx.float8 = group, float8
        ctx.save_for_backward(part, *flat[::2])
        whole = all_gather_sequence(part, group)
        return tuple(linear(whole, weight, bias, float8) for weight, bias in zip(flat[::2], flat[1::2], strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        part, *weights = ctx.saved_tensors
        whole = all_gather_sequence(part, ctx.group).flatten(0, -2)
        pairs = zip(gradients, weights, strict=True)
        inputs = sum_of([gradient_of_inputs(gradient, weight, ctx.float8) for gradient, weight in pairs])
        results: list[Tensor | None] = [reduce_scatter_sequence(inputs, ctx.group), None, None]
        for number, gradient in enumerate(gradients):
            rows, wanted = gradient.flatten(0, -2), ctx.needs_input_grad[3 + 2 * number : 5 + 2 * number]
            results.append(gradient_of_weight(rows, whole, ctx.float8) if wanted[0] else None)
            results.append(rows.sum(0) if wanted[1] else None)
        return tuple(results)


class RowParallelLinear(LinearLayer):
    """A linear layer with sharded inputs: each rank has i/tp of them."""

    def __init__(
        self, inputs: int, outputs: int, bias: bool, initialise: Initialiser, grid: ParallelGrid, float8: bool = False
    ) -> None:
        super().__init__()
        self.grid, self.float8 = grid, float8
        self.weight = new_parameter((outputs, inputs), 1, initialise, grid)
        self.bias = new_parameter((outputs,), None, zeros, grid) if bias else None
        self.lora: nn.Module | None = None  # see lora.py

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, s, i/tp] -> [b, s, o], the same on every rank; [b, s/tp, o] with sequence parallelism."""
        return row_parallel_sum((self, inputs))

    def partial(self, inputs: Tensor) -> Tensor:
        """This rank's summand of the outputs, without the bias: [b, s, i/tp] -> [b, s, o]."""
        outputs = linear(inputs, self.factor, None, self.float8)
        return outputs if self.lora is None else outputs + self.lora(inputs)


def row_parallel_sum(*branches: tuple[RowParallelLinear, Tensor]) -> Tensor:
    """The sum of several row-parallel layers, each of its own inputs [b, s, i/tp] -> [b, s, o] or [b, s/tp, o].

    One all-reduce (or reduce-scatter) forward for all. The sum of the biases is added after it: torch 2.13's inductor
    cannot compile the backward of two bf16 biases with the same gradient.
    """
    partial = sum_of([layer.partial(inputs) for layer, inputs in branches])
    grid = branches[0][0].grid
    whole = sum_over_ranks(partial, grid)
    biases = [layer.bias for layer, _ in branches if layer.bias is not None]
    return whole + replicated_parameter(sum_of(biases), grid) if biases else whole


def sum_over_ranks(partial: Tensor, grid: ParallelGrid) -> Tensor:
    """Partial sums [b, s, h] of the tensor-parallel ranks -> hidden states [b, s, h] or [b, s/tp, h]."""
    group = grid.group("tensor")
    return scatter_sequence(partial, group) if grid.sequence_parallel else reduce_from_group(partial, group)


def replicated_parameter(parameter: Tensor, grid: ParallelGrid) -> Tensor:
    """A replicated parameter, for use on hidden states.

    With sequence parallelism each rank uses it on its part of the sequence, so its gradient is summed over the group:
    here in autograd, because after the backward pass ZeRO may have reduced and freed it.
    """
    return copy_to_group(parameter, grid.group("tensor")) if grid.sequence_parallel else parameter


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of at least one tensor, without the zero that `sum` starts from."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


class VocabParallelEmbedding(LinearLayer):
    """A token embedding with rows sharded over the group, for input and, if tied, for output.

    vocab_size: rows without padding; padded_size: rows in memory, divisible by tp. Padding rows are zero, get no
    gradient, and their logits are -inf. bias: of the logits, sharded like the rows. transform: of the logits with it.
    """

    padding_logits: Tensor | None

    def __init__(
        self,
        vocab_size: int,
        padded_size: int,
        hidden_size: int,
        initialise: Initialiser,
        grid: ParallelGrid,
        bias: bool = False,
        transform: LogitTransform = UNCHANGED,
    ) -> None:
        super().__init__()
        self.grid, self.transform = grid, transform
        self.vectors: torch.dtype | None = None  # the type of the token vectors; None: that of the weight
        self.weight = new_parameter((vocab_size, hidden_size), 0, initialise, grid, padded_size)
        self.bias = new_parameter((vocab_size,), 0, zeros, grid, padded_size) if bias else None
        rows = padded_size // grid.size("tensor")
        start = grid.rank("tensor") * rows
        self.shard = VocabularyShard(grid.group("tensor"), start, min(max(vocab_size - start, 0), rows))
        self.loss_kernels: Kernels = EAGER
        # added to the logits if this rank has padding rows: -inf for those, 0 for the others
        beyond = torch.arange(start, start + rows, device=grid.device) >= vocab_size
        logits = torch.zeros(rows, device=grid.device).masked_fill(beyond, float("-inf"))
        self.register_buffer("padding_logits", logits if start + rows > vocab_size else None, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [b, s] int64 -> [b, s, h], the same on every rank; [b, s/tp, h] with sequence parallelism."""
        rows = self.weight.shape[0]
        if self.grid.size("tensor") == 1:
            return self._typed(F.embedding(tokens, self.weight))
        row = tokens - self.shard.start
        elsewhere = (row < 0) | (row >= rows)
        vectors = self._typed(F.embedding(row.masked_fill(elsewhere, 0), self.weight))
        return sum_over_ranks(vectors.masked_fill(elsewhere.unsqueeze(-1), 0), self.grid)

    def _typed(self, vectors: Tensor) -> Tensor:
        return vectors if self.vectors is None else vectors.to(self.vectors)

    def logits(self, hidden: Tensor) -> Tensor:
        """[b, s, h] or [b, s/tp, h] -> [b, s, padded_size/tp], padding columns -inf."""
        padding = None if self.padding_logits is None else self.padding_logits.to(hidden.dtype)
        if self.bias is None and self.transform == UNCHANGED:
            return column_parallel(hidden, self.grid, (self.factor, padding))[0]
        logits = column_parallel(hidden, self.grid, (self.factor, self.bias))[0]
        if self.transform != UNCHANGED:
            logits = transform_logits(logits, self.transform)
        return logits if padding is None else logits + padding

    def loss(self, hidden: Tensor, labels: Tensor, loss_weights: Tensor) -> Tensor:
        """The sum over tokens of loss weight * negative log likelihood in nats, a scalar in fp32, without `logits`.

        hidden: [b, s, h] or [b, s/tp, h]. labels: [b, s] int64. loss_weights: [b, s] fp32. The same value on every
        rank. One all-reduce (or reduce-scatter) of the gradient of hidden states backward.
        """
        group = self.grid.group("tensor")
        hidden = gather_sequence(hidden, group) if self.grid.sequence_parallel else copy_to_group(hidden, group)
        return linear_cross_entropy(
            hidden, self.factor, labels, loss_weights, self.shard, self.loss_kernels, self.bias, self.transform
        )
