"""Self-attention with heads sharded over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, n query heads and g key/value heads on this rank, r = n/g query heads per
key/value head, d head size.
One matrix projects to queries, keys and values. Its rows are ordered by key/value head: the r query heads that share
it, the key, the value. So a tensor-parallel shard is one slice, with grouped queries too. If the ranks do not divide
the key/value heads, n, g and r count copies (shared_heads.py).
"""

import torch
from torch import Tensor, nn

from megatron.config.plan import AttentionKind, ModelPlan
from megatron.model.attention_backends import block_windows
from megatron.model.attention_kernels import Attend, FlexAttention, Scores, Visible
from megatron.model.block_mask import block_mask
from megatron.model.cache import KVCache, Positions
from megatron.model.init import weight_initialisers
from megatron.model.layer import NO_MASKING, Masking
from megatron.model.positions import Rotation, positions_in_documents
from megatron.model.query_key_norm import query_key_norm
from megatron.model.score_bias import ScoreBias
from megatron.model.shared_heads import fused_exchange
from megatron.parallel.collectives import exchange
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.random import own_stream
from megatron.registry import resolve


class Attention(nn.Module):
    """Causal multi-head attention; with fewer key/value heads it is GQA (https://arxiv.org/abs/2305.13245)."""

    def __init__(
        self, model: ModelPlan, grid: ParallelGrid, index: int, kind: AttentionKind, rotation: Rotation | None
    ) -> None:
        """index: of the layer, also in the cache. rotation: rotary positions for queries and keys, or None."""
        super().__init__()
        width = model.num_attention_heads * model.head_size
        outputs = width + 2 * model.num_kv_heads * model.head_size
        init, output_init = weight_initialisers(model)
        self.query_key_value = ColumnParallelLinear(
            model.hidden_size,
            outputs,
            model.bias_in_query_key_value,
            init,
            grid,
            model.float8,
            fused_exchange(model, grid),
        )
        self.norm = query_key_norm(model, grid)
        self.dense = RowParallelLinear(width, model.hidden_size, model.bias_in_dense, output_init, grid, model.float8)
        at_scores = resolve("position_embedding", model.position_embedding).at_scores
        self.score_bias: ScoreBias | None = at_scores(model, grid) if at_scores else None
        self.attend: Attend = resolve("attention_backend", kind)(model, grid.device)
        self.by_blocks: tuple[int, int | None] | None = None  # the number and the size of the window
        self.changed_scores = Scores.of(model).composed
        if isinstance(self.attend, FlexAttention):
            self.by_blocks = block_windows(model, grid.device).index(self.attend.window), self.attend.window
        self.index, self.rotation, self.dropout, self.grid = index, rotation, model.attention_dropout, grid
        self.kv_heads = model.kv_heads_on_rank(grid.size("tensor"), grid.size("context"))
        self.queries_per_key = model.queries_per_key(grid.size("tensor") * grid.size("context"))
        self.head_size, self.clip = model.head_size, model.clip_qkv
        self.reset_mask, self.reset_positions = model.reset_attention_mask, model.reset_position_ids

    def forward(self, hidden: Tensor, cache: KVCache | None = None, masking: Masking = NO_MASKING) -> Tensor:
        """Attend over `hidden` [b, s, h], the same on every tensor-parallel rank; returns [b, s, h].

        With context parallelism `hidden` is this rank's part of the sequence, and each rank computes its part of the
        heads over the whole sequence (Ulysses, https://arxiv.org/abs/2309.14509).
        masking: of the whole sequence.
        One all-reduce forward (in `self.dense`), one backward (in `self.query_key_value`).
        """
        output: Tensor = self.dense(self.heads(hidden, cache, masking))
        return output

    def heads(self, hidden: Tensor, cache: KVCache | None = None, masking: Masking = NO_MASKING) -> Tensor:
        """The output of this rank's heads before the output projection: [b, s, h] -> [b, s, n*d]."""
        query, key, value = self._query_key_value(hidden, cache, masking.document_start)
        visible = self._visible(masking, query.shape[1], hidden.device)
        if cache is not None:
            key, value = cache.append(self.index, key, value)
            visible = cache.visibility(self.index)
        if not (self.training and self.dropout):
            mixed = self.attend(query, key, value, visible, 0.0, self.score_bias)
        else:
            with own_stream(self.grid):
                mixed = self.attend(query, key, value, visible, self.dropout, self.score_bias)
        return exchange(mixed, 1, 2, self.grid.group("context")).flatten(2)

    def _visible(self, masking: Masking, length: int, device: torch.device) -> Visible:
        """What the queries of whole sequences see."""
        first = masking.document_start if self.reset_mask else None
        if self.by_blocks is not None and masking.counts is not None and masking.indices is not None:
            number, window = self.by_blocks
            if first is not None or window is not None or self.changed_scores:  # else no block would be skipped
                return block_mask(masking.counts[number], masking.indices[number], first, window, length)
        if first is None:
            return None
        columns = torch.arange(length, device=device).unsqueeze(0)
        return Positions(columns, columns, first)

    def _query_key_value(
        self, hidden: Tensor, cache: KVCache | None, document_start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [b, s, n, d], key and value [b, s, g, d], rotated; n/cp and g/cp heads with context parallelism."""
        fused = self.query_key_value(hidden)
        if self.clip is not None:
            fused = fused.clamp(-self.clip, self.clip)
        parts = fused.unflatten(-1, (self.kv_heads, self.queries_per_key + 2, self.head_size))
        queries_and_key, value = parts.split([self.queries_per_key + 1, 1], dim=3)
        if self.norm is not None:
            queries_and_key = self.norm(queries_and_key)
        queries_and_key, value = (exchange(part, 2, 1, self.grid.group("context")) for part in (queries_and_key, value))
        if self.rotation is not None:
            positions = None if cache is None else cache.positions
            if document_start is not None and self.reset_positions:
                positions = positions_in_documents(document_start)
            # of the whole text: all its keys are rotated alike, whatever step they come from
            lengths = None if cache is None else cache.lengths
            queries_and_key = self.rotation(queries_and_key, positions, lengths)
        query, key = queries_and_key.split([self.queries_per_key, 1], dim=3)
        return query.flatten(2, 3), key.squeeze(3), value.squeeze(3)


def describe_attention(model: ModelPlan, device: torch.device, dtype: torch.dtype) -> list[str]:
    """One line for each kind of attention in the model: number of layers, kernel, reason."""
    lines = []
    for kind in dict.fromkeys(model.attention_kinds):
        count = model.attention_kinds.count(kind)
        attend: Attend = resolve("attention_backend", kind)(model, device)
        lines.append(f"attention: {kind} in {count} of {model.num_layers} layers: {attend.describe(dtype)}")
    return lines
