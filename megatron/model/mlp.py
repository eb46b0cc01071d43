"""The feed-forward layer, sharded over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, f feed-forward width, tp ranks of the group.
Gate and up are separate matrices, so that each shard is one slice.
"""

from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.model.activations import Activation
from megatron.model.init import weight_initialisers
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear, column_parallel_layers
from megatron.registry import resolve


class MLP(nn.Module):
    """`down(function(up(x)))`, or `down(function(gate(x)) * up(x))` with a gated activation."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        hidden, width, bias = model.hidden_size, model.ffn_hidden_size, model.bias_in_mlp
        init, output_init = weight_initialisers(model)
        activation: Activation = resolve("activation", model.activation)
        self.function = activation.function
        self.up = ColumnParallelLinear(hidden, width, bias, init, grid, model.float8)
        self.gate = ColumnParallelLinear(hidden, width, bias, init, grid, model.float8) if activation.gated else None
        self.down = RowParallelLinear(width, hidden, bias, output_init, grid, model.float8)
        self.grid = grid

    def forward(self, hidden: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h], or [b, s/tp, h] -> [b, s/tp, h]. One all-reduce forward and one backward."""
        output: Tensor = self.down(self.wide(hidden))
        return output

    def wide(self, hidden: Tensor) -> Tensor:
        """The activations before the output projection: [b, s, h] or [b, s/tp, h] -> [b, s, f/tp]."""
        if self.gate is None:
            return self.function(self.up(hidden))
        gate, up = column_parallel_layers(hidden, self.gate, self.up)
        return self.function(gate) * up
