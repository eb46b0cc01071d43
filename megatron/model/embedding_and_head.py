"""The layers before and after the blocks: embedding, final norm and head.

Shapes: b micro-batch, s sequence, h hidden, v vocabulary in memory, tp tensor-parallel ranks.
"""

import math

import torch
from torch import Tensor, nn

from megatron.config.plan import ModelPlan
from megatron.model.attention_backends import block_windows
from megatron.model.attention_kernels import Scores
from megatron.model.block_mask import block_lists
from megatron.model.cache import KVCache
from megatron.model.init import weight_initialisers
from megatron.model.layer import LayerInput, Masking, Targets, pack, unpack
from megatron.model.positions import PositionEmbedding, positions_in_documents
from megatron.parallel.cross_entropy import LogitTransform
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import VocabParallelEmbedding
from megatron.parallel.random import dropout, with_noise
from megatron.registry import resolve


class Embedding(VocabParallelEmbedding):
    """Token embedding times its factor, position embedding if the model adds one here, norm, and dropout.

    The factor is rounded to the type of the weights, as in Gemma: in bf16 the square root of 3072 is 55.5.

    With neftune_noise_alpha, noise on the token embedding in training (NEFTune, https://arxiv.org/abs/2310.05914):
    uniform, of at most alpha / sqrt(s * h), s being the whole sequence.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid, kind: PositionEmbedding | None) -> None:
        """kind: of the position embedding; None: this copy only serves as the head of a model with tied embeddings."""
        init, _ = weight_initialisers(model)
        super().__init__(
            model.vocab_size, model.padded_vocab_size, model.hidden_size, init, grid, transform=_transform(model)
        )
        self.multiplier = model.embedding_multiplier
        self.positions = kind.at_embedding(model, grid) if kind and kind.at_embedding else None
        self.norm = resolve("norm", model.norm)(model, grid) if kind and model.embedding_norm else None
        self.dropout, self.max_positions = model.hidden_dropout, model.max_position_embeddings
        self.noise_alpha = model.neftune_noise_alpha
        self.reset_mask, self.reset_positions = model.reset_attention_mask, model.reset_position_ids
        self.block_windows = block_windows(model, grid.device)
        self.changed_scores = Scores.of(model).composed

    def forward(self, inputs: LayerInput, cache: KVCache | None = None) -> LayerInput:  # type: ignore[override]
        """Token ids [b, s] int64 -> [b, s, h]. With a cache the tokens are its next step.

        With context parallelism the tokens are this rank's part, [b, s/cp]; with sequence parallelism the result is
        its part of those, [b, s/cp/tp, h]. `Masking` stays unsharded.
        Raises ValueError for more tokens than max_position_embeddings.
        """
        tokens, masking = unpack(inputs)
        length = tokens.shape[1] * self.grid.size("context")
        if length > self.max_positions:
            raise ValueError(f"{length} tokens are more than max_position_embeddings ({self.max_positions})")
        hidden = super().forward(tokens)
        if self.multiplier != 1.0:
            hidden = hidden * torch.tensor(self.multiplier, dtype=hidden.dtype).item()
        if self.noise_alpha is not None and self.training:
            hidden = with_noise(hidden, self.noise_alpha / math.sqrt(length * hidden.shape[-1]), self.grid)
        if self.positions is not None:
            positions = None if cache is None else cache.positions
            if masking.document_start is not None and self.reset_positions:
                positions = positions_in_documents(masking.document_start)[:, self.grid.own_tokens(hidden.shape[1])]
            hidden = self.positions(hidden, positions)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if cache is None:
            masking = self._with_blocks(masking, length, tokens.device)
        return pack(dropout(hidden, self.dropout, self.training, self.grid), masking)

    def _with_blocks(self, masking: Masking, length: int, device: torch.device) -> Masking:
        """Add the lists of blocks, if a layer attends by blocks and would skip any; see `block_mask.py`."""
        first = masking.document_start if self.reset_mask else None
        whole = all(window is None or window >= length for window in self.block_windows)
        if first is None and whole and not self.changed_scores:
            return masking
        if not self.block_windows:
            return masking
        if first is None:
            first = torch.zeros(1, length, dtype=torch.int32, device=device)
        return Masking(masking.document_start, *block_lists(first, self.block_windows))


def apply_head(
    head: VocabParallelEmbedding, inputs: LayerInput, cache: KVCache | None = None, targets: Targets | None = None
) -> Tensor:
    """The model's output, from the weight of `head` or of a tied embedding.

    [b, s, h] -> logits [b, s, v/tp], padding columns -inf; with `targets` the sum over tokens of loss weight * negative
    log likelihood, a scalar in fp32, the same on every tensor-parallel rank.
    """
    hidden, _ = unpack(inputs)
    return head.logits(hidden) if targets is None else head.loss(hidden, *targets)


class Head(VocabParallelEmbedding):
    """The head of a model with an untied weight."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        init, _ = weight_initialisers(model)
        super().__init__(
            model.vocab_size,
            model.padded_vocab_size,
            model.hidden_size,
            init,
            grid,
            model.head_bias,
            _transform(model),
        )

    def forward(self, inputs: LayerInput, cache: KVCache | None = None, targets: Targets | None = None) -> Tensor:
        """Logits or loss; see `apply_head`."""
        return apply_head(self, inputs, cache, targets)


def _transform(model: ModelPlan) -> LogitTransform:
    return LogitTransform(model.logit_multiplier, model.logit_softcap)


class FinalNorm(nn.Module):
    """The norm after the last block."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.final_norm: nn.Module = resolve("norm", model.norm)(model, grid)

    def forward(self, inputs: LayerInput, cache: KVCache | None = None) -> LayerInput:
        """[b, s, h] -> [b, s, h]; `Masking` is forwarded, as a pipeline sends one form between stages."""
        hidden, masking = unpack(inputs)
        return pack(self.final_norm(hidden), masking)
