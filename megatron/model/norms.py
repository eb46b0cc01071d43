"""Norms of the hidden state.

Shapes: b micro-batch, s sequence (or this rank's part of it), h hidden. Hidden size and weights are not sharded.
Statistics are computed in fp32 for every input type, by torch's kernels or after a cast. A norm of the registry is
built as `norm(model, grid)`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.initial_values import ones, zeros
from megatron.parallel.layers import replicated_parameter
from megatron.parallel.parameter import new_parameter


class LayerNorm(nn.Module):
    """Layer normalisation (https://arxiv.org/abs/1607.06450), with a weight, and a bias if the plan has norm_bias."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((model.hidden_size,), None, ones, grid)
        self.bias = new_parameter((model.hidden_size,), None, zeros, grid) if model.norm_bias else None
        self.grid, self.epsilon = grid, model.norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        weight = replicated_parameter(self.weight, self.grid)
        bias = None if self.bias is None else replicated_parameter(self.bias, self.grid)
        return F.layer_norm(hidden, weight.shape, weight, bias, self.epsilon)


class NonParametricLayerNorm(nn.Module):
    """Layer normalisation without weight and bias (OLMo, https://arxiv.org/abs/2402.00838)."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.epsilon = model.norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return F.layer_norm(hidden, hidden.shape[-1:], None, None, self.epsilon)


class RMSNorm(nn.Module):
    """Root mean square normalisation (https://arxiv.org/abs/1910.07467), with a weight."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((model.hidden_size,), None, ones, grid)
        self.grid, self.epsilon = grid, model.norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return F.rms_norm(hidden, self.weight.shape, replicated_parameter(self.weight, self.grid), self.epsilon)


class RMSNorm1p(nn.Module):
    """RMSNorm that multiplies by 1 + weight, in fp32 (Gemma, https://arxiv.org/abs/2403.08295).

    The weight starts at 0. In 16 bits 1 + weight would round most of a small weight away.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((model.hidden_size,), None, zeros, grid)
        self.grid, self.epsilon = grid, model.norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        factor = 1 + replicated_parameter(self.weight, self.grid).float()
        return F.rms_norm(hidden.float(), factor.shape, factor, self.epsilon).to(hidden.dtype)


class ScaleNorm(nn.Module):
    """Division by the length of the vector, at least epsilon, and one learned factor for all elements.

    https://arxiv.org/abs/1910.05895. The factor starts at 1 as in GPT-NeoX, in the paper at sqrt(h).
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((1,), None, ones, grid)
        self.grid, self.epsilon = grid, model.norm_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        unit = F.normalize(hidden.float(), dim=-1, eps=self.epsilon)
        return (unit * replicated_parameter(self.weight, self.grid).float()).to(hidden.dtype)
