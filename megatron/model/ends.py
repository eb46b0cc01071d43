"""The two ends of the model: tokens in, logits out.

Shapes: b micro-batch, s sequence, h hidden, v vocabulary in memory, tp tensor-parallel ranks.
"""

from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.model.cache import KVCache
from megatron.model.init import weight_initialisers
from megatron.model.layer import Flow, put_together, taken_apart
from megatron.model.positions import PositionEmbedding, positions_in_documents
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import VocabParallelEmbedding
from megatron.parallel.random import dropout
from megatron.registry import resolve


class Embedding(VocabParallelEmbedding):
    """Token vectors, positions if they are added here, and dropout."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid, kind: PositionEmbedding | None) -> None:
        """kind: of the position embedding; None where this is only the head of a model with tied embeddings."""
        init, _ = weight_initialisers(model)
        super().__init__(model.vocab_size, model.padded_vocab_size, model.hidden_size, init, grid)
        self.positions = kind.at_embedding(model, grid) if kind and kind.at_embedding else None
        self.dropout, self.max_positions = model.hidden_dropout, model.max_position_embeddings
        self.recount = model.reset_position_ids

    def forward(self, flow: Flow, cache: KVCache | None = None) -> Flow:  # type: ignore[override]
        """Token ids [b, s] int64 -> [b, s, h]. With a cache the tokens continue what it holds, as its next step.

        Where the sequence is cut over ranks, the tokens are this rank's context-parallel part, [b, s/cp], and the
        result its sequence-parallel part of that; where documents begin is told of the whole sequence.
        Raises ValueError for more tokens, padding included, than the model has positions.
        """
        tokens, document_start = taken_apart(flow)
        if cache is not None:
            cache.begin_step(tokens.shape[1])
        length = tokens.shape[1] * self.grid.size("context") if cache is None else cache.length
        if length > self.max_positions:
            raise ValueError(f"{length} tokens are more than max_position_embeddings ({self.max_positions})")
        hidden = super().forward(tokens)
        if self.positions is not None:
            positions = None if cache is None else cache.positions
            if document_start is not None and self.recount:
                positions = positions_in_documents(document_start)[:, self.grid.own_tokens(hidden.shape[1])]
            hidden = self.positions(hidden, positions)
        return put_together(dropout(hidden, self.dropout, self.training, self.grid), document_start)


def embedding_logits(embedding: nn.Module, flow: Flow, cache: KVCache | None = None) -> Tensor:
    """Logits by the embedding's own weight: [b, s, h] -> [b, s, v/tp]."""
    assert isinstance(embedding, Embedding)
    return embedding.logits(taken_apart(flow)[0])


class Head(VocabParallelEmbedding):
    """Logits by a weight of its own (untied), without a bias."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        init, _ = weight_initialisers(model)
        super().__init__(model.vocab_size, model.padded_vocab_size, model.hidden_size, init, grid)

    def forward(self, flow: Flow, cache: KVCache | None = None) -> Tensor:
        """[b, s, h] -> [b, s, v/tp], padding columns -inf."""
        return self.logits(taken_apart(flow)[0])


class FinalNorm(nn.Module):
    """The norm after the last block."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.final_norm: nn.Module = resolve("norm", model.norm)(model.hidden_size, model.norm_epsilon, grid)

    def forward(self, flow: Flow, cache: KVCache | None = None) -> Flow:
        """[b, s, h] -> [b, s, h]; where documents begin is passed on, as another stage may hold the head."""
        hidden, document_start = taken_apart(flow)
        return put_together(self.final_norm(hidden), document_start)
