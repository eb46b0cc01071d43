"""Position embeddings.

Shapes: b micro-batch, s sequence, h hidden, n heads (of any kind), d head size, p the rotated part of d,
m max_position_embeddings. Positions are [b, s] int64, or None for 0 to s-1 in every sequence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config.plan import ModelPlan, RopeScaling
from megatron.errors import UserError
from megatron.model.init import weight_initialisers
from megatron.model.score_bias import Alibi, RelativePositions, RoundedAlibi, ScoreBias
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import replicated_parameter
from megatron.parallel.parameter import new_parameter

# (queries or keys [b, s, ..., d], positions, lengths of the whole sequences) -> the same shape
Rotation = Callable[[Tensor, Tensor | None, Sequence[int] | None], Tensor]


@dataclass(frozen=True)
class PositionEmbedding:
    """A kind of position embedding: a module after the token embedding, a rotation of queries and keys, a bias of the
    attention scores, or nothing of these.
    """

    at_embedding: Callable[[ModelPlan, ParallelGrid], nn.Module] | None = None  # forward(hidden, positions) -> hidden
    at_attention: Callable[[ModelPlan, ParallelGrid], Rotation] | None = None  # shared by layers
    at_scores: Callable[[ModelPlan, ParallelGrid], ScoreBias] | None = None  # one for each layer


class LearnedTable(nn.Module):
    """A learned vector for each position, added to the token's vector; replicated over tensor-parallel ranks.

    Its first position_offset rows are of no position (OPT).
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.grid, self.offset = grid, model.position_offset
        initialise, _ = weight_initialisers(model)
        rows = model.max_position_embeddings + model.position_offset
        self.weight = new_parameter((rows, model.hidden_size), None, initialise, grid)

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """[b, s, h] -> [b, s, h]; if the sequence is sharded, `hidden` and `positions` are this rank's part."""
        table = replicated_parameter(self.weight, self.grid)
        if positions is None:
            own = self.grid.own_tokens(hidden.shape[1])
            return hidden + table[own.start + self.offset : own.stop + self.offset]
        return hidden + F.embedding(positions + self.offset if self.offset else positions, table)


class Sinusoids(nn.Module):
    """Sines and cosines of each position, added to the token's vector (https://arxiv.org/abs/1706.03762).

    As in GPT-NeoX the first half of the vector has the sines and the second the cosines of the same angles, position *
    10000^(-2i/h). Angles and sum are fp32.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        super().__init__()
        self.grid = grid
        exponents = torch.arange(0, model.hidden_size, 2, dtype=torch.float32) / model.hidden_size
        self.frequencies = (1.0 / 10000.0**exponents).to(grid.device)

    def forward(self, hidden: Tensor, positions: Tensor | None = None) -> Tensor:
        """[b, s, h] -> [b, s, h]; if the sequence is sharded, `hidden` and `positions` are this rank's part."""
        if positions is None:
            own = self.grid.own_tokens(hidden.shape[1])
            positions = torch.arange(own.start, own.stop, device=hidden.device).unsqueeze(0)
        angles = positions.unsqueeze(-1) * self.frequencies
        return (hidden + torch.cat((angles.sin(), angles.cos()), dim=-1)).to(hidden.dtype)


class RotaryTable:
    """Rotary positions (https://arxiv.org/abs/2104.09864).

    The first p = head_size * rotary_fraction elements of a head are rotated, the others are unchanged. A pair is
    element i and i + p/2, or with rotary_interleaved 2i and 2i + 1. Angles are fp32 and not part of a module, so that
    casting the model to bf16 does not round them.
    """

    def __init__(self, model: ModelPlan, grid: ParallelGrid) -> None:
        """Raise UserError if p is odd or 0."""
        self.width = int(model.head_size * model.rotary_fraction)
        if self.width == 0 or self.width % 2:
            raise UserError(
                f"rotary_pct ({model.rotary_fraction}) turns {self.width} of the {model.head_size} elements of a head;"
                " it must be an even number, at least 2"
            )
        self.base, self.scaling, self.interleaved = model.rotary_base, model.rope_scaling, model.rotary_interleaved
        self.positions, self.device = model.max_position_embeddings, grid.device
        self.short = self.positions  # longest sequence of which the frequencies do not depend on the length
        if self.scaling is not None and self.scaling.kind in ("dynamic", "longrope"):
            self.short = min(self.positions, self.scaling.original_positions)
        self.tables = self._tables(self.short)
        self.long_tables = self._tables(self.positions) if self.positions > self.short else None
        # the positions of the last step of decoding, which all layers share, and what was looked up for them
        self._known: tuple[Tensor | None, tuple[Tensor, Tensor]] = (None, self.tables)

    def __call__(self, heads: Tensor, positions: Tensor | None = None, lengths: Sequence[int] | None = None) -> Tensor:
        """Rotate queries or keys [b, s, ..., d] by their positions, in fp32; returns the input's type.

        lengths: of the whole sequences, by which dynamic and longrope scaling choose the frequencies; unset: s.
        """
        if positions is None or torch.compiler.is_compiling():
            cosine, sine = self._cosine_and_sine(heads, positions, lengths or [heads.shape[1]])
        else:
            if self._known[0] is not positions:
                self._known = positions, self._cosine_and_sine(heads, positions, lengths or [heads.shape[1]])
            cosine, sine = self._known[1]
        if self.interleaved:
            pairs, rest = heads.split([self.width, heads.shape[-1] - self.width], dim=-1)
            first, second = pairs.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-1).flatten(-2)
            return torch.cat((turned, rest), dim=-1).to(heads.dtype)
        first, second, rest = heads.split([self.width // 2, self.width // 2, heads.shape[-1] - self.width], dim=-1)
        rotated = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat((*rotated, rest), dim=-1).to(heads.dtype)

    def _cosine_and_sine(
        self, heads: Tensor, positions: Tensor | None, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """[b or 1, s, 1..., p/2] each."""
        first, *others = [self._tables_for(length) for length in lengths] if self.long_tables else [self.tables]
        if positions is None or all(other is first for other in others):
            cosine, sine = (self._at(table, heads, positions) for table in first)
            return cosine, sine
        rows = [
            [self._at(table, heads, positions[row : row + 1]) for table in tables]
            for row, tables in enumerate((first, *others))
        ]
        cosine, sine = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return cosine, sine

    def _tables_for(self, length: int) -> tuple[Tensor, Tensor]:
        if length <= self.short or self.long_tables is None:
            return self.tables
        if length == self.positions or (self.scaling is not None and self.scaling.kind == "longrope"):
            return self.long_tables
        return self._tables(length)

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [length, p/2] for sequences of `length` tokens."""
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32) / self.width
        frequencies, factor = 1.0 / self.base**exponents, 1.0
        if self.scaling is not None:
            frequencies = scaled_frequencies(frequencies, self.base, self.scaling, length)
            factor = attention_factor(self.scaling)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        cosine, sine = torch.cos(angles), torch.sin(angles)
        if factor != 1.0:
            cosine, sine = factor * cosine, factor * sine
        return cosine.to(self.device), sine.to(self.device)

    @staticmethod
    def _at(table: Tensor, heads: Tensor, positions: Tensor | None) -> Tensor:
        """The rows of `table` at the positions, [b or 1, s, 1..., p/2], to broadcast over heads."""
        rows = table[: heads.shape[1]].unsqueeze(0) if positions is None else table[positions]
        return rows.view(*rows.shape[:2], *(1,) * (heads.dim() - 3), rows.shape[-1])


def rotations(kind: PositionEmbedding, model: ModelPlan, grid: ParallelGrid) -> list[Rotation | None]:
    """The rotation of each layer; layers with the same frequencies share one, None for layers without."""
    if kind.at_attention is None:
        return [None] * model.num_layers
    usual = local = kind.at_attention(model, grid)
    if model.rotary_base_local is not None:
        local = kind.at_attention(replace(model, rotary_base=model.rotary_base_local, rope_scaling=None), grid)
    return [
        None if layer in model.layers_without_rotary else local if attention == "local" else usual
        for layer, attention in enumerate(model.attention_kinds)
    ]


def scaled_frequencies(frequencies: Tensor, base: float, scaling: RopeScaling, length: int) -> Tensor:
    """Rotary frequencies [p/2], in radians per token, scaled for longer contexts; `length` tokens in a sequence.

    linear: Position Interpolation (https://arxiv.org/abs/2306.15595). dynamic: a base that grows with the length beyond
    the original one (NTK-aware, https://arxiv.org/abs/2309.00071, appendix A.1 and B.3). yarn: frequencies of less than
    beta_slow turns within the original context are divided by the factor, those of more than beta_fast are unchanged,
    and between them the share is linear in the index (same paper). llama3: high frequencies are unchanged, low ones
    are divided by the factor, and those between are interpolated linearly (https://arxiv.org/abs/2407.21783; the four
    numbers are those of the published config.json). longrope: each is divided by a factor of its own, one set of
    which is for sequences longer than the original (https://arxiv.org/abs/2402.13753).
    """
    original, pairs = scaling.original_positions, len(frequencies)
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "dynamic":
        stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
        return frequencies / stretch ** (torch.arange(pairs, dtype=torch.float32) / (pairs - 1))
    if scaling.kind == "longrope":
        return frequencies / torch.tensor(scaling.long_factors if length > original else scaling.short_factors)
    if scaling.kind == "yarn":
        kept = 1 - _yarn_ramp(base, scaling, pairs)
    else:
        turns = original * frequencies / (2 * torch.pi)  # within the original context
        kept = ((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn_ramp(base: float, scaling: RopeScaling, pairs: int) -> Tensor:
    """The share of interpolation [p/2]: 0 up to the index of beta_fast turns, 1 from that of beta_slow turns on."""
    low, high = (
        pairs * math.log(scaling.original_positions / (turns * 2 * math.pi)) / math.log(base)
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    return ((torch.arange(pairs, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)


def attention_factor(scaling: RopeScaling) -> float:
    """The factor of rotated queries and keys with yarn and longrope, by the formulas of their papers unless set."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind not in ("yarn", "longrope") or scaling.factor <= 1:
        return 1.0
    growth = math.log(scaling.factor)
    if scaling.kind == "longrope":
        return math.sqrt(1 + growth / math.log(scaling.original_positions))
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return (0.1 * scaling.mscale * growth + 1) / (0.1 * scaling.mscale_all_dim * growth + 1)
    return 0.1 * growth + 1


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
sinusoidal = PositionEmbedding(at_embedding=Sinusoids)
rotary = PositionEmbedding(at_attention=RotaryTable)
alibi = PositionEmbedding(at_scores=Alibi)
alibi_bf16 = PositionEmbedding(at_scores=RoundedAlibi)
rpe = PositionEmbedding(at_scores=RelativePositions)
none = PositionEmbedding()
