"""Position embeddings.

Shapes: b micro-batch, s sequence, h hidden, n heads (of any kind), d head size, p the rotated part of d,
m max_position_embeddings. Positions are [b, s] int64, or None for 0 to s-1 in every sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.plan import ModelPlan, RopeScaling
from megatron.errors import UserError
from megatron.model.init import weight_initialisers
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import replicated_parameter
from megatron.parallel.parameter import new_parameter

Rotation = Callable[[Tensor, Tensor | None], Tensor]  # (queries or keys [b, s, ..., d], positions) -> the same shape


@dataclass(frozen=True)
class PositionEmbedding:
    """A kind of position embedding: a module after the token embedding, a rotation of queries and keys, or neither."""

    at_embedding: Callable[[ModelPlan, ParallelGrid], nn.Module] | None = None  # forward(hidden, positions) -> hidden
    at_attention: Callable[[ModelPlan, ParallelGrid], Rotation] | None = None  # one for all layers


class LearnedTable(nn.Module):
    """A learned vector for each position, added to the token's vector; replicated over tensor-parallel ranks."""

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.grid = grid
        initialise, _ = weight_initialisers(model)
        self.weight = new_parameter((model.max_position_embeddings, model.hidden_size), None, initialise, grid)

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """[b, s, h] -> [b, s, h]; if the sequence is sharded, `hidden` and `positions` are this rank's part."""
        table = replicated_parameter(self.weight, self.grid)
        if positions is None:
            return hidden + table[self.grid.own_tokens(hidden.shape[1])]
        return hidden + F.embedding(positions, table)


class RotaryTable:
    """Rotary positions (https://arxiv.org/abs/2104.09864) that pair element i with i + p/2.

    The first p = head_size * rotary_fraction elements of a head are rotated, the others are unchanged. Angles are fp32
    and not part of a module, so that casting the model to bf16 does not round them.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        """Raise UserError if p is odd or 0."""
        self.width = int(model.head_size * model.rotary_fraction)
        if self.width == 0 or self.width % 2:
            raise UserError(
                f"rotary_pct ({model.rotary_fraction}) turns {self.width} of the {model.head_size} elements of a head;"
                " it must be an even number, at least 2"
            )
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32) / self.width
        frequencies = scaled_frequencies(1.0 / model.rotary_base**exponents, model.rope_scaling)
        angles = torch.outer(torch.arange(model.max_position_embeddings, dtype=torch.float32), frequencies)
        self.cosine, self.sine = (f(angles).to(grid.device) for f in (torch.cos, torch.sin))  # [m, p/2]

    def __call__(self, heads: Tensor, positions: Tensor | None = None) -> Tensor:
        """Rotate queries or keys [b, s, ..., d] by their positions, in fp32; returns the input's type."""
        cosine, sine = (self._at(table, heads, positions) for table in (self.cosine, self.sine))
        first, second, rest = heads.split([self.width // 2, self.width // 2, heads.shape[-1] - self.width], dim=-1)
        rotated = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat((*rotated, rest), dim=-1).to(heads.dtype)

    @staticmethod
    def _at(table: Tensor, heads: Tensor, positions: Tensor | None) -> Tensor:
        """The rows of `table` at the positions, [b or 1, s, 1..., p/2], to broadcast over heads."""
        rows = table[: heads.shape[1]].unsqueeze(0) if positions is None else table[positions]
        return rows.view(*rows.shape[:2], *(1,) * (heads.dim() - 3), rows.shape[-1])


def scaled_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Rotary frequencies [p/2], in radians per token, scaled for longer contexts.

    linear: Position Interpolation (https://arxiv.org/abs/2306.15595). llama3: high frequencies are unchanged, low ones
    are divided by the factor, and those between are interpolated linearly (https://arxiv.org/abs/2407.21783; the four
    numbers are those of the published config.json).
    """
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_positions * frequencies / (2 * torch.pi)  # within the original context
    kept = ((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def document_starts(tokens: Tensor, end: int) -> Tensor:
    """The column in which each token's document begins: int32 [b, s] from tokens [b, s].

    A document ends with its `end` token. The first one of a sample starts in column 0, even if it began earlier.
    """
    columns = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    begins = torch.zeros_like(tokens, dtype=torch.int32)
    begins[:, 1:] = torch.where(tokens[:, :-1] == end, columns[1:], 0)
    return begins.cummax(dim=1).values


def positions_in_documents(document_start: Tensor) -> Tensor:
    """Positions relative to each document's start: int32 [b, s] -> int64 [b, s]."""
    return torch.arange(document_start.shape[1], device=document_start.device) - document_start


learned = PositionEmbedding(at_embedding=LearnedTable)
rotary = PositionEmbedding(at_attention=RotaryTable)
none = PositionEmbedding()
