"""One transformer block: attention and feed-forward layer around a residual stream.

Shapes: b micro-batch, s sequence, h hidden.
A block is a pure function of its input and the random state (and the cache, in decoding), so it can be recomputed.
"""

from functools import partial

from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.model.attention import Attention
from megatron.model.cache import KVCache
from megatron.model.layer import LayerInput, Masking, pack, unpack
from megatron.model.mlp import MLP
from megatron.model.positions import Rotation
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import row_parallel_sum
from megatron.parallel.random import dropout
from megatron.registry import resolve


class TransformerBlock(nn.Module):
    """Serial or parallel block, with norms on the inputs of its branches, on their outputs, or on both.

    Serial: x = x + attention(input_norm(x)), then x = x + mlp(post_attention_norm(x)).
    Serial, norms on outputs (OLMo 2): x = x + post_attention_norm(attention(x)), then x = x + post_mlp_norm(mlp(x)).
    Serial, norms on both (Gemma 2): x = x + post_attention_norm(attention(input_norm(x))), then
    x = x + post_mlp_norm(mlp(pre_mlp_norm(x))).
    Parallel: x = x + attention(input_norm(x)) + mlp(post_attention_norm(x)), or input_norm for both (GPT-J). The
    branches share one all-reduce and, with hidden dropout, one mask.
    Each branch is multiplied by residual_multiplier before it is added (Granite).
    """

    input_norm: nn.Module
    post_attention_norm: nn.Module
    pre_mlp_norm: nn.Module
    post_mlp_norm: nn.Module

    def __init__(self, model: ModelPlan, grid: ParallelGrid, index: int, rotation: Rotation | None) -> None:
        """index: of the block, from 0. rotation: rotary positions for queries and keys, or None."""
        super().__init__()
        norm = partial(resolve("norm", model.norm), model, grid)
        self.index = index
        self.parallel, self.norm_placement = model.parallel_residual, model.norm_placement
        self.one_norm = model.parallel_residual and model.tied_norm
        if self.norm_placement != "output":
            self.input_norm = norm()
        self.attention = Attention(model, grid, index, model.attention_kinds[index], rotation)
        if not self.one_norm:
            self.post_attention_norm = norm()
        if self.norm_placement == "both":
            self.pre_mlp_norm = norm()
        self.mlp = MLP(model, grid)
        if self.norm_placement != "input":
            self.post_mlp_norm = norm()
        self.dropout, self.residual_multiplier, self.grid = model.hidden_dropout, model.residual_multiplier, grid

    def forward(self, inputs: LayerInput, cache: KVCache | None = None) -> LayerInput:
        """[b, s, h] -> [b, s, h], the same on every tensor-parallel rank; `Masking` is forwarded.

        With sequence parallelism the hidden states are this rank's part of the sequence, [b, s/tp, h].
        """
        hidden, masking = unpack(inputs)
        if self.parallel:
            hidden = hidden + self._residual(self._both_branches(hidden, cache, masking))
        elif self.norm_placement == "input":
            hidden = hidden + self._residual(self.attention(self.input_norm(hidden), cache, masking))
            hidden = hidden + self._residual(self.mlp(self.post_attention_norm(hidden)))
        elif self.norm_placement == "output":
            hidden = hidden + self._residual(self.post_attention_norm(self.attention(hidden, cache, masking)))
            hidden = hidden + self._residual(self.post_mlp_norm(self.mlp(hidden)))
        else:
            attended = self.attention(self.input_norm(hidden), cache, masking)
            hidden = hidden + self._residual(self.post_attention_norm(attended))
            hidden = hidden + self._residual(self.post_mlp_norm(self.mlp(self.pre_mlp_norm(hidden))))
        return pack(hidden, masking)

    def _both_branches(self, hidden: Tensor, cache: KVCache | None, masking: Masking) -> Tensor:
        """The sum of attention and feed-forward layer, both of `hidden`."""
        normed = self.input_norm(hidden)
        heads = self.attention.heads(normed, cache, masking)
        wide = self.mlp.wide(normed if self.one_norm else self.post_attention_norm(hidden))
        return row_parallel_sum((self.attention.dense, heads), (self.mlp.down, wide))

    def _residual(self, branch: Tensor) -> Tensor:
        """What is added to the residual stream, of the output of a branch."""
        scaled = branch if self.residual_multiplier == 1 else branch * self.residual_multiplier
        return dropout(scaled, self.dropout, self.training, self.grid)
