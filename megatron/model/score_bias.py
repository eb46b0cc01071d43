"""Position embeddings that add a bias to the attention scores.

Shapes: n query heads that this rank computes, k keys.
A bias is a function of the number of keys that gives a table [n, k] in fp32: one value for each head and each distance
of a key from its query or, if `of_keys` is true, for each head and each position of a key.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.model.init import weight_initialisers
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import new_parameter


class ScoreBias(Protocol):
    """The bias of one layer."""

    of_keys: bool  # the table is indexed by the position of the key, not by its distance from the query

    def __call__(self, keys: int) -> Tensor:
        """The table [n, keys], fp32."""
        ...

    def slopes(self) -> Tensor | None:
        """[n] fp32, if the bias is -slope * distance; otherwise None."""
        ...


def heads_of_rank(model: ModelPlan, grid: ParallelGrid) -> range:
    """The query heads that this rank computes: its tensor-parallel share, of which it has a share of the context."""
    parts = grid.size("tensor") * grid.size("context")
    count = model.num_attention_heads // parts
    first = (grid.rank("tensor") * grid.size("context") + grid.rank("context")) * count
    return range(first, first + count)


class Alibi:
    """ALiBi (https://arxiv.org/abs/2108.12409): -slope * distance, with a slope for each head and nothing learned.

    The slopes of a power of two of heads are a geometric sequence from 2 ** (-8 / heads) to 2 ** -8; other numbers of
    heads take those of the next lower power, and then every second one of the next higher power (BLOOM, MPT).
    """

    of_keys = False

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        self.heads, self.count, self.device = heads_of_rank(model, grid), model.num_attention_heads, grid.device

    def __call__(self, keys: int) -> Tensor:
        """The table [n, keys] by distance."""
        return -self.slopes()[:, None] * torch.arange(keys, device=self.device)

    def slopes(self) -> Tensor:
        """[n] fp32."""
        return alibi_slopes(self.heads, self.count, self.device)


def alibi_slopes(heads: range, count: int, device: torch.device) -> Tensor:
    """The slopes of `heads` among `count`, fp32; see `Alibi`."""
    power = 2 ** math.floor(math.log2(count))
    number = torch.arange(heads.start, heads.stop, dtype=torch.float32, device=device)
    later = number - power
    return torch.exp2(-8 / power * torch.where(later < 0, number + 1, later + 0.5))


class RoundedAlibi:
    """ALiBi as Falcon-RW computes it: slope * position of the key / sqrt(head size), slope and product rounded to bf16.

    Adding the same number to all scores of a query does not change their softmax. So the position of the key serves as
    well as its distance, except that the rounding depends on it.
    """

    of_keys = True

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        self.heads, self.count, self.device = heads_of_rank(model, grid), model.num_attention_heads, grid.device
        self.divisor = math.sqrt(model.head_size)

    def __call__(self, keys: int) -> Tensor:
        """The table [n, keys] by position of the key."""
        slopes = alibi_slopes(self.heads, self.count, self.device).bfloat16()
        return (slopes[:, None] * torch.arange(keys, device=self.device)).float() / self.divisor

    def slopes(self) -> None:
        """Rounding makes the bias not linear."""
        return None


class RelativePositions(nn.Module):
    """A learned bias for each head and bucket of distances (T5, https://arxiv.org/abs/1910.10683), of causal attention.

    Half of the buckets hold one distance each; the others hold ranges that grow as powers, up to `relative_distance`,
    from which on all distances share the last one. Each layer has a table of its own, sharded by heads.
    """

    of_keys = False

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.buckets, self.far, self.grid = model.relative_buckets, model.relative_distance, grid
        initialise, _ = weight_initialisers(model)
        self.weight = new_parameter((model.relative_buckets, model.num_attention_heads), 1, initialise, grid)

    def forward(self, keys: int) -> Tensor:
        """The table [n, keys] by distance."""
        heads = self.weight.chunk(self.grid.size("context"), dim=1)[self.grid.rank("context")]
        return heads.float()[self._bucket(torch.arange(keys, device=self.weight.device))].t()

    def _bucket(self, distance: Tensor) -> Tensor:
        single = self.buckets // 2
        steps = torch.log(distance.clamp(min=single) / single) / math.log(self.far / single) * (self.buckets - single)
        return torch.where(distance < single, distance, (single + steps.long()).clamp(max=self.buckets - 1))

    def slopes(self) -> None:
        """The bias is not linear."""
        return None
