"""Attention whose scores are changed before the softmax, as matrix products of blocks of queries with the keys.

Shapes: b micro-batch, s queries, k keys (the queries are the last s of them), n query heads and g key/value heads on
this rank, r = n/g, d head size, q queries of a block.
One operation for autograd, recomputation and torch.compile. It stores its inputs only and computes the scores again in
the backward pass, so that at any time the scores of one block exist, [b, n, q, k].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.model.cache import Positions

QUERY_BLOCK = 128


@dataclass(frozen=True)
class _Blocks:
    """The arguments of the operation, but for queries and values, and what follows from them."""

    key: Tensor
    table: Tensor | None
    positions: Positions
    of_keys: bool
    in_order: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout: float
    seed: int

    def __iter__(self) -> "Iterator[_Block]":
        queries, keys = self.positions.queries.shape[1], self.key.shape[1]
        generator = torch.Generator(self.key.device).manual_seed(self.seed) if self.dropout else None
        for start in range(0, queries, QUERY_BLOCK):
            rows = slice(start, min(start + QUERY_BLOCK, queries))
            # a column is further from another one than a window if their positions are
            first = 0 if self.window is None else max(0, keys - queries + start - self.window + 1)
            columns = slice(first, keys - queries + rows.stop) if self.in_order else slice(0, keys)
            yield _Block(self, rows, columns, generator)


@dataclass(frozen=True)
class _Block:
    """Some queries, and the keys that they may see."""

    whole: _Blocks
    rows: slice
    columns: slice
    generator: torch.Generator | None

    def grouped(self, tensor: Tensor) -> Tensor:
        """[b, s, n, d] -> [b, g, r*q, d], so that the heads that share a key are its queries."""
        part: Tensor = tensor[:, self.rows].unflatten(2, (self.whole.key.shape[2], -1))
        return part.permute(0, 2, 3, 1, 4).flatten(2, 3)

    def separate(self, mixed: Tensor) -> Tensor:
        """The inverse of `grouped` for this block: [b, g, r*q, d] -> [b, q, n, d]."""
        heads: Tensor = mixed.unflatten(2, (-1, self.rows.stop - self.rows.start))  # [b, g, r, q, d]
        return heads.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def of_columns(self, tensor: Tensor) -> Tensor:
        """Keys or values [b, k, g, d] that the block may see -> [b, g, k, d]."""
        return tensor[:, self.columns].transpose(1, 2)

    def index(self) -> Tensor:
        """Where in the table the bias stands: [b or 1, q, k]."""
        queries, keys = self.whole.positions.queries[:, self.rows, None], self.whole.positions.keys[:, None]
        keys = keys[..., self.columns]
        distance = keys.expand(-1, queries.shape[1], -1) if self.whole.of_keys else queries - keys
        return distance.clamp(min=0)  # of what is not visible

    def weights(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        """The softmax [b, g, r*q, k] in fp32 of grouped queries and keys, and the capped scores divided by the cap."""
        whole, shares = self.whole, None
        scores = (query @ key.mT).float() * whole.scale
        if whole.softcap is not None:
            shares = torch.tanh(scores / whole.softcap)
            scores = shares * whole.softcap
        first = None if whole.positions.first is None else whole.positions.first[:, self.rows]
        seen = Positions(whole.positions.queries[:, self.rows], whole.positions.keys[:, self.columns], first)
        scores = scores.unflatten(2, (-1, seen.queries.shape[1]))  # [b, g, r, q, k]
        if whole.table is not None:
            scores = scores + whole.table[:, self.index()].transpose(0, 1).unflatten(1, scores.shape[1:3])
        hidden = ~seen.visible(whole.window).unsqueeze(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1).flatten(2, 3), shares

    def kept(self, weights: Tensor) -> Tensor | None:
        """What dropout multiplies the weights by; None: nothing is dropped."""
        if self.generator is None:
            return None
        share = 1 - self.whole.dropout
        return torch.empty_like(weights).bernoulli_(share, generator=self.generator) / share


@torch.library.custom_op("deepy::composed_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def composed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    first: Tensor | None,
    of_keys: bool,
    in_order: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale * query key^T) + bias) value: query [b, s, n, d], key and value [b, k, g, d] -> [b, s, n, d].

    table: the bias, [n, at least k] (`score_bias.py`). queries, keys, first, in_order: the fields of `Positions`.
    window: keys that a query sees, its own included. softcap: c of c * tanh(scores / c).
    dropout: probability of dropping an attention weight.
    The second result is the seed of the masks, which the backward pass draws again.
    """
    seed = torch.randint(2**63 - 1, ()) if dropout else torch.zeros((), dtype=torch.int64)
    positions = Positions(queries, keys, first)
    blocks = _Blocks(key, table, positions, of_keys, in_order, window, scale, softcap, dropout, int(seed))
    mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
    for block in blocks:
        weights, _ = block.weights(block.grouped(query), block.of_columns(key))
        kept = block.kept(weights)
        weights = weights if kept is None else weights * kept
        mixed[:, block.rows] = block.separate(weights.to(value.dtype) @ block.of_columns(value))
    return mixed, seed


@composed_attention.register_fake
def _(query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    mixed = torch.empty_like(query, memory_format=torch.contiguous_format)
    return mixed, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("deepy::composed_attention_backward", mutates_args=())
def _backward_operation(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    first: Tensor | None,
    seed: Tensor,
    of_keys: bool,
    in_order: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and table (an empty tensor if there is none)."""
    positions = Positions(queries, keys, first)
    blocks = _Blocks(key, table, positions, of_keys, in_order, window, scale, softcap, dropout, int(seed))
    of_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    of_key, of_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
    of_table = torch.zeros_like(table) if table is not None else query.new_empty(0)
    for block in blocks:
        own_query, own_key, own_value = block.grouped(query), block.of_columns(key), block.of_columns(value)
        weights, shares = block.weights(own_query, own_key)
        of_mixed, kept = block.grouped(gradient), block.kept(weights)
        used = (weights if kept is None else weights * kept).to(value.dtype)
        of_value[:, block.columns] += (used.mT @ of_mixed).transpose(1, 2)
        of_weights = (of_mixed @ own_value.mT).float()
        if kept is not None:
            of_weights = of_weights * kept
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        if table is not None:
            _add_to_table(of_table, block, of_scores)
        if shares is not None:
            of_scores = of_scores * (1 - shares.square())
        of_scores = (of_scores * scale).to(query.dtype)
        of_query[:, block.rows] = block.separate(of_scores @ own_key)
        of_key[:, block.columns] += (of_scores.mT @ own_query).transpose(1, 2)
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_table


def _add_to_table(of_table: Tensor, block: _Block, of_scores: Tensor) -> None:
    """Add the gradients of a block's scores [b, g, r*q, k] to those of the table, [n, k]."""
    index = block.index()
    by_head = of_scores.unflatten(2, (-1, index.shape[1])).flatten(1, 2)  # [b, n, q, k]
    if index.shape[0] == 1:
        by_head = by_head.sum(0, keepdim=True)
    of_table.index_add_(1, index.flatten(), by_head.transpose(0, 1).flatten(1))


@_backward_operation.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, table: Tensor | None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    of_query, of_key, of_value = (torch.empty_like(tensor, memory_format=contiguous) for tensor in (query, key, value))
    return of_query, of_key, of_value, torch.empty_like(table) if table is not None else query.new_empty(0)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.settings, ctx.has_table = inputs[7:], inputs[3] is not None


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward_operation(gradient, *ctx.saved_tensors, *ctx.settings)
    return (*gradients[:3], gradients[3] if ctx.has_table else None, *[None] * 9)


composed_attention.register_autograd(_backward, setup_context=_keep_inputs)
