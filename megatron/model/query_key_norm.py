"""RMSNorm of queries and keys before rotary positions.

Shapes: b micro-batch, s sequence, n query heads and g key/value heads on this rank, r = n/g query heads per key/value
head, d head size. Heads are ordered as in attention: for each key/value head its r query heads, then the key.
"""

import torch
from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.parallel.collectives import copy_to_group, reduce_from_group
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.initial_values import ones
from megatron.parallel.parameter import new_parameter


class Weight(nn.Module):
    """The weight of a norm that its parent module computes."""

    def __init__(self, size: int, shard_dim: int | None, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((size,), shard_dim, ones, grid)


class HeadNorm(nn.Module):
    """RMSNorm of each head (Qwen 3, https://arxiv.org/abs/2505.09388); all heads share a weight [d]."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.query, self.key = (Weight(model.head_size, None, grid) for _ in range(2))
        self.group, self.epsilon = grid.group("tensor"), model.norm_epsilon

    def forward(self, heads: Tensor) -> Tensor:
        """[b, s, g, r+1, d] -> the same shape. Two all-reduces of [d] backward, for the replicated weights."""
        query, key = (copy_to_group(norm.weight, self.group) for norm in (self.query, self.key))
        weights = torch.cat((query.expand(heads.shape[3] - 1, -1), key.unsqueeze(0)))
        return torch.nn.functional.rms_norm(heads, heads.shape[-1:], None, self.epsilon) * weights


class FullNorm(nn.Module):
    """RMSNorm over all queries of a token, and over all keys (OLMo 2, https://arxiv.org/abs/2501.00656).

    The weights, [all query heads * d] and [all key heads * d], are sharded like the heads.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.widths = (model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size)
        self.query, self.key = (Weight(width, 0, grid) for width in self.widths)
        self.group, self.epsilon = grid.group("tensor"), model.norm_epsilon

    def forward(self, heads: Tensor) -> Tensor:
        """[b, s, g, r+1, d] -> the same shape. One all-reduce of [b, s, 2] forward and one backward."""
        groups, share, size = heads.shape[2], heads.shape[3] - 1, heads.shape[4]
        wide = heads.float()
        squares = wide.square().sum(dim=(2, 4))  # [b, s, r+1]
        sums = torch.stack((squares[..., :share].sum(-1), squares[..., share]), dim=-1)
        # every rank uses the total sum, so its gradient is a sum over the ranks as well
        sums = copy_to_group(reduce_from_group(sums, self.group), self.group)
        scales = (sums / sums.new_tensor(self.widths) + self.epsilon).rsqrt()
        scales = torch.cat((scales[..., :1].expand(-1, -1, share), scales[..., 1:]), dim=-1)[:, :, None, :, None]
        query, key = self.query.weight.view(groups, share, size), self.key.weight.view(groups, 1, size)
        return (wide * scales).to(heads.dtype) * torch.cat((query, key), dim=1)


def query_key_norm(model: ModelPlan, grid: ParallelGrid) -> nn.Module | None:
    """The norm that `model` requires, or None."""
    if model.qk_norm is None:
        return None
    return HeadNorm(model, grid) if model.qk_norm == "head" else FullNorm(model, grid)
