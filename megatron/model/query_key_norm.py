"""Norms of queries and keys before rotary positions, of the kind that the model's other norms have.

Shapes: b micro-batch, s sequence, n query heads and g key/value heads on this rank, r = n/g query heads per key/value
head, d head size. Heads are ordered as in attention: for each key/value head its r query heads, then the key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.model.shared_heads import key_exchange
from megatron.parallel.collectives import copy_to_group, reduce_from_group
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.initial_values import ones, zeros
from megatron.parallel.parameter import new_parameter


class Weights(nn.Module):
    """The weight, and with `bias` the bias, of a norm that its parent module computes."""

    def __init__(self, size: int, shard_dim: int | None, model: ModelPlan, bias: bool, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((size,), shard_dim, zeros if model.norm == "rmsnorm_1p" else ones, grid)
        self.bias = new_parameter((size,), shard_dim, zeros, grid) if bias else None


class QueryKeyNorm(nn.Module):
    """Norms of queries and of keys. `model.qk_norm` says over what, and how many weights there are.

    head: each head; one weight [d] for all queries and one for all keys (Qwen 3, https://arxiv.org/abs/2505.09388;
    Gemma 3; Phi, with biases).
    each_head: each head; a weight for each, without bias (StableLM, Cohere).
    full: all queries of a token together, and all keys (OLMo 2, https://arxiv.org/abs/2501.00656).
    The weights of each_head and full, [all query heads * d] and [all key heads * d], are sharded like the heads.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        widths = (model.num_attention_heads * model.head_size, model.num_kv_heads * model.head_size)
        self.shared, self.over_all = model.qk_norm == "head", model.qk_norm == "full"
        self.centred, self.one_plus = model.norm == "layernorm", model.norm == "rmsnorm_1p"
        sizes = (model.head_size,) * 2 if self.shared else widths
        has_bias = self.centred and model.norm_bias and model.qk_norm != "each_head"
        self.query, self.key = (Weights(size, None if self.shared else 0, model, has_bias, grid) for size in sizes)
        self.group, self.epsilon, self.exchange = grid.group("tensor"), model.norm_epsilon, key_exchange(model, grid)
        tensor, context = grid.size("tensor"), grid.size("context")
        copies = tensor * model.kv_heads_on_rank(tensor, context)
        self.summed = (widths[0], copies * model.head_size)  # elements that all ranks have; as many copies of each key

    def forward(self, heads: Tensor) -> Tensor:
        """[b, s, g, r+1, d] -> the same shape.

        head: an all-reduce of [d] backward for each weight, which every rank uses. full: an all-reduce of [b, s, 2]
        forward and one backward, with layernorm two.
        """
        inputs = heads.float() if self.one_plus else heads
        if self.over_all:
            normed = self._normed_together(inputs)
        elif self.centred:
            normed = F.layer_norm(inputs, inputs.shape[-1:], None, None, self.epsilon)
        else:
            normed = F.rms_norm(inputs, inputs.shape[-1:], None, self.epsilon)
        weight = self._for_heads(self.query.weight, self.key.weight, heads)
        scaled = normed * (1 + weight.float() if self.one_plus else weight)
        if self.query.bias is not None and self.key.bias is not None:
            scaled = scaled + self._for_heads(self.query.bias, self.key.bias, heads)
        return scaled.to(heads.dtype)

    def _for_heads(self, query: Tensor, key: Tensor, heads: Tensor) -> Tensor:
        """What belongs to each head: [g, r+1, d], or [r+1, d] if all have the same."""
        groups, share, size = heads.shape[2], heads.shape[3] - 1, heads.shape[4]
        if self.shared:
            query, key = copy_to_group(query, self.group), copy_to_group(key, self.group)
            return torch.cat((query.expand(share, -1), key.unsqueeze(0)))
        key = key if self.exchange is None else self.exchange(key)
        return torch.cat((query.view(groups, share, size), key.view(groups, 1, size)), dim=1)

    def _normed_together(self, heads: Tensor) -> Tensor:
        """The queries of a token normalized as one vector, and its keys as another; without weights."""
        wide = heads.float()
        if self.centred:
            wide = wide - _to_heads(self._means(wide), wide)
        scales = (self._means(wide.square()) + self.epsilon).rsqrt()
        return (wide * _to_heads(scales, wide)).to(heads.dtype)

    def _means(self, values: Tensor) -> Tensor:
        """The means of `values` [b, s, g, r+1, d] over all queries and over all keys of all ranks: [b, s, 2]."""
        of_heads = values.sum(dim=(2, 4))
        sums = torch.stack((of_heads[..., :-1].sum(-1), of_heads[..., -1]), dim=-1)
        # every rank uses the total sum, so its gradient is a sum over the ranks as well
        sums = copy_to_group(reduce_from_group(sums, self.group), self.group)
        return sums / sums.new_tensor(self.summed)


def _to_heads(values: Tensor, heads: Tensor) -> Tensor:
    """One value for queries and one for keys, [b, s, 2] -> [b, s, 1, r+1, 1]."""
    queries = values[..., :1].expand(-1, -1, heads.shape[3] - 1)
    return torch.cat((queries, values[..., 1:]), dim=-1)[:, :, None, :, None]


def query_key_norm(model: ModelPlan, grid: ParallelGrid) -> nn.Module | None:
    """The norm that `model` requires, or None."""
    return None if model.qk_norm is None else QueryKeyNorm(model, grid)
