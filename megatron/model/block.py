"""One transformer block: attention and feed-forward layer around a residual stream.

Shapes: b micro-batch, s sequence, h hidden.
A block is a pure function of its input and the random state (and the cache, when decoding), so it can be recomputed.
"""

from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.model.attention import Attention
from megatron.model.cache import KVCache
from megatron.model.layer import Flow, put_together, taken_apart
from megatron.model.mlp import MLP
from megatron.model.positions import Rotation
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import row_parallel_sum
from megatron.parallel.random import dropout
from megatron.registry import resolve


class TransformerBlock(nn.Module):
    """Serial or parallel block, with the norms on the inputs of its branches or on their outputs.

    Serial: x = x + attention(norm(x)), then x = x + mlp(norm(x)).
    Serial, norms on outputs (OLMo 2): x = x + norm(attention(x)), then x = x + norm(mlp(x)).
    Parallel: x = x + attention(norm(x)) + mlp(norm(x)), with a norm for each or one for both (GPT-J); the branches
    share one all-reduce and, with hidden dropout, one mask.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid, index: int, rotation: Rotation | None) -> None:
        """index: the number of the block, from 0. rotation: turns queries and keys by position; None: nothing does."""
        super().__init__()
        norm = resolve("norm", model.norm)
        self.input_norm: nn.Module | None = None
        if not model.norms_on_outputs:
            self.input_norm = norm(model.hidden_size, model.norm_epsilon, grid)
        self.attention = Attention(model, grid, index, model.attention_kinds[index], rotation)
        self.post_attention_norm: nn.Module | None = None
        if not (model.parallel_residual and model.tied_norm):
            self.post_attention_norm = norm(model.hidden_size, model.norm_epsilon, grid)
        self.mlp = MLP(model, grid)
        self.post_mlp_norm: nn.Module | None = None
        if model.norms_on_outputs:
            self.post_mlp_norm = norm(model.hidden_size, model.norm_epsilon, grid)
        self.parallel_residual, self.dropout, self.grid = model.parallel_residual, model.hidden_dropout, grid

    def forward(self, flow: Flow, cache: KVCache | None = None) -> Flow:
        """[b, s, h] -> [b, s, h], the same on every tensor-parallel rank; where documents begin is passed on.

        With sequence parallelism the hidden states are this rank's part of the sequence, [b, s/tp, h].
        """
        hidden, document_start = taken_apart(flow)
        if self.parallel_residual:
            return put_together(hidden + self._drop(self._both_branches(hidden, cache, document_start)), document_start)
        assert self.post_attention_norm is not None
        if self.post_mlp_norm is not None:
            hidden = hidden + self._drop(self.post_attention_norm(self.attention(hidden, cache, document_start)))
            return put_together(hidden + self._drop(self.post_mlp_norm(self.mlp(hidden))), document_start)
        assert self.input_norm is not None
        hidden = hidden + self._drop(self.attention(self.input_norm(hidden), cache, document_start))
        return put_together(hidden + self._drop(self.mlp(self.post_attention_norm(hidden))), document_start)

    def _both_branches(self, hidden: Tensor, cache: KVCache | None, document_start: Tensor | None) -> Tensor:
        assert self.input_norm is not None
        normed = self.input_norm(hidden)
        heads = self.attention.heads(normed, cache, document_start)
        wide = self.mlp.wide(normed if self.post_attention_norm is None else self.post_attention_norm(hidden))
        return row_parallel_sum((self.attention.dense, heads), (self.mlp.down, wide))

    def _drop(self, branch: Tensor) -> Tensor:
        return dropout(branch, self.dropout, self.training, self.grid)
