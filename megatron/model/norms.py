"""Normalisations of the hidden state.

Shapes: b micro-batch, s sequence (or this rank's part of it), h hidden. Hidden size and weights are not sharded.
Statistics are computed in fp32 for every input type (torch's kernels do so).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.grid import ParallelGrid
from megatron.parallel.initial_values import ones, zeros
from megatron.parallel.layers import replicated_parameter
from megatron.parallel.parameter import new_parameter


class LayerNorm(nn.Module):
    """Layer normalisation (https://arxiv.org/abs/1607.06450), with weight and bias."""

    def __init__(self, hidden_size: int, epsilon: float, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((hidden_size,), None, ones, grid)
        self.bias = new_parameter((hidden_size,), None, zeros, grid)
        self.grid, self.epsilon = grid, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        weight, bias = replicated_parameter(self.weight, self.grid), replicated_parameter(self.bias, self.grid)
        return F.layer_norm(hidden, weight.shape, weight, bias, self.epsilon)


class RMSNorm(nn.Module):
    """Root mean square normalisation (https://arxiv.org/abs/1910.07467), with a weight."""

    def __init__(self, hidden_size: int, epsilon: float, grid: ParallelGrid) -> None:
        super().__init__()
        self.weight = new_parameter((hidden_size,), None, ones, grid)
        self.grid, self.epsilon = grid, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]."""
        return F.rms_norm(hidden, self.weight.shape, replicated_parameter(self.weight, self.grid), self.epsilon)
