"""The kernels that compute softmax(scale * query key^T) value, with a cap of the scores or a bias if the model has one.

Shapes: b micro-batch, s queries, k keys (k >= s; the queries are the last s of them), n query heads and g key/value
heads on this rank, d head size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron.config.plan import ModelPlan
from megatron.model.cache import Positions, StepPositions
from megatron.model.composed_attention import QUERY_BLOCK, composed_attention
from megatron.model.score_bias import ScoreBias
from megatron.registry import resolve

_SDPA = "torch's scaled_dot_product_attention"
MOST_BLOCKS = 16
WORTH_A_ROW = 2**15  # elements of keys that a CPU converts and multiplies while it calls the operations of a row
MOST_SHAPES = (
    64  # that FlexAttention is compiled for (widths x windows x micro-batch sizes); beyond, it runs uncompiled
)
FLASH_TYPES = (torch.float16, torch.bfloat16)
# What queries see: all keys up to their own, of which they are the last (None); by position; or by block, where that
# is how the kernel computes.
Visible = Positions | BlockMask | None
Bias = ScoreBias | None  # what is added to the scores


@contextmanager
def kernels_for_decoding() -> Iterator[None]:
    """Leave cuDNN out: it builds a graph for each number of keys, which changes with each token that is decoded.

    torch's `sdpa_kernel` would do, and take a hundredth of a small model's step.
    """
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


class Attend(Protocol):
    """An attention kernel for one layer."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, bias: Bias = None
    ) -> Tensor:
        """Query [b, s, n, d], key and value [b, k, g, d] -> [b, s, n, d].

        dropout: probability of dropping an attention weight. bias: added to the scores; None: nothing.
        """
        ...

    def describe(self, dtype: torch.dtype) -> str:
        """The kernel used for tensors of `dtype` and the reason, for the start-up line."""
        ...


@dataclass(frozen=True)
class Scores:
    """What a model does to its attention scores before the softmax, beside the bias that a layer passes."""

    scale: float | None = None  # their factor; None: 1 / sqrt(d)
    softcap: float | None = None  # c of c * tanh(scores / c)
    biased: bool = False  # the layers pass a bias

    @property
    def composed(self) -> bool:
        """Whether torch's scaled_dot_product_attention cannot compute them without scores for every query and key."""
        return self.softcap is not None or self.biased

    @classmethod
    def of(cls, model: ModelPlan) -> "Scores":
        """The scores of `model`."""
        biased = resolve("position_embedding", model.position_embedding).at_scores is not None
        return cls(model.attention_scale, model.attention_softcap, biased)

    def describe(self) -> str:
        """What is done to them, for the start-up line; empty without a cap and a bias."""
        parts = [f"capped at {self.softcap:g}"] if self.softcap is not None else []
        return " and ".join(parts + (["with a bias for positions"] if self.biased else []))


class ScaledDotProduct:
    """torch's scaled_dot_product_attention, which chooses a cuDNN, flash, memory-efficient or plain kernel.

    Capped or biased scores are computed in blocks of queries instead (`composed_attention.py`).
    """

    def __init__(
        self,
        window: int | None = None,
        reason: str = "",
        kernel: Callable[[torch.dtype], str] | None = None,
        scores: Scores = Scores(),
    ) -> None:
        """window: keys that a query sees, its own included; None: all before it.

        For `describe`: the reason, and the kernel that torch chooses for a type.
        """
        self.window, self.reason, self.kernel, self.scores = window, reason, kernel, scores

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        kernel = f" ({self.kernel(dtype)} kernel)" if self.kernel and not self.scores.composed else ""
        window = f" with a window of {self.window} tokens" if self.window else ""
        reason = f", because {self.reason}" if self.reason else ""
        if self.scores.composed:
            return f"blocks of {QUERY_BLOCK} queries{window}, scores {self.scores.describe()}{reason}"
        return _SDPA + kernel + window + reason

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, bias: Bias = None
    ) -> Tensor:
        """Attend; see `Attend`."""
        assert not isinstance(visible, BlockMask)
        queries, keys = query.shape[1], key.shape[1]
        if self.scores.composed:
            return self._composed(query, key, value, visible or _in_order(queries, keys, query.device), dropout, bias)
        if visible is None and (queries not in (1, keys) or (self.window or keys) < keys):
            visible = _in_order(queries, keys, query.device)
        if isinstance(visible, StepPositions) and visible.ends is not None and _is_faster_by_row(visible.ends, key):
            return self._by_row(query, key, value, visible.ends)
        mask = visible.visible(self.window) if visible else None
        if queries == 1 and not query.is_cuda:
            # in 16 bits torch's kernel takes 2 to 4 times as long as in fp32 with the conversion of the keys
            mixed = self._of_queries(query.float(), key.float(), value.float(), mask, dropout)
            return mixed.to(query.dtype)
        return self._of_queries(query, key, value, mask, dropout)

    def _by_row(self, query: Tensor, key: Tensor, value: Tensor, ends: tuple[int, ...]) -> Tensor:
        """One query of each row, over the keys before its end alone."""
        grouped = query.unflatten(2, (key.shape[2], -1)).squeeze(1).float()  # [b, g, r, d]
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        mixed = torch.empty_like(grouped)
        for row, end in enumerate(ends):
            own, seen = slice(row, row + 1), slice(0 if self.window is None else max(0, end - self.window), end)
            mixed[row] = F.scaled_dot_product_attention(
                grouped[own], key[own, :, seen].float(), value[own, :, seen].float(), scale=self.scores.scale
            )
        return mixed.flatten(1, 2).unsqueeze(1).to(query.dtype)

    def _of_queries(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """By the kernels of torch; without a mask one query sees all keys, and several are all there are."""
        queries = query.shape[1]
        grouped = query.shape[2] != key.shape[2]
        if grouped and queries == 1:
            # the queries that share a key are its queries, so that any kernel can take them
            query = query.unflatten(2, (key.shape[2], -1)).squeeze(1).transpose(1, 2)
            return self._mix(query, key, value, mask, False, dropout).transpose(1, 2).flatten(1, 2).unsqueeze(1)
        if grouped and query.is_cuda and (mask is not None or query.dtype not in FLASH_TYPES):
            # the memory-efficient kernel takes masks and fp32, but in torch 2.11 only as many keys as queries
            key, value = (tensor.repeat_interleave(query.shape[2] // key.shape[2], 2) for tensor in (key, value))
        return self._mix(query, key, value, mask, mask is None and queries > 1, dropout)

    def _composed(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Positions, dropout: float, bias: Bias
    ) -> Tensor:
        mixed: Tensor
        mixed, _ = composed_attention(
            query,
            key,
            value,
            bias(key.shape[1]) if bias is not None else None,
            visible.queries,
            visible.keys,
            visible.first,
            bias is not None and bias.of_keys,
            visible.in_order,
            self.window,
            self.scores.scale or query.shape[-1] ** -0.5,
            self.scores.softcap,
            dropout,
        )
        return mixed

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float
    ) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=self.scores.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return mixed.transpose(1, 2)


def _is_faster_by_row(ends: Sequence[int], key: Tensor) -> bool:
    """Whether computing each row of `key` [b, k, g, d] by itself, up to its end, is faster than all of them to k."""
    spared = len(ends) * key.shape[1] - sum(ends)
    return not key.is_cuda and spared * key[0, 0].numel() > len(ends) * WORTH_A_ROW


def _in_order(queries: int, keys: int, device: torch.device) -> Positions:
    """The positions of the last `queries` of `keys` tokens, and of the keys."""
    columns = torch.arange(keys, device=device).unsqueeze(0)
    return Positions(columns[:, keys - queries :], columns)


class QueryBlocks(ScaledDotProduct):
    """Causal attention as matrix products of query blocks with the keys before them, for compiled code on a CPU.

    torch's kernel takes 1.5 to 2 times as long there. Half of the s x s scores are stored for the backward pass, so
    long sequences use torch's kernel, as does everything that is not compiled.
    """

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        return f"{super().describe(dtype)}, compiled: blocks of {QUERY_BLOCK} queries"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, bias: Bias = None
    ) -> Tensor:
        """Attend; see `Attend`."""
        length = query.shape[1]
        fits = length == key.shape[1] and length % QUERY_BLOCK == 0 and length <= MOST_BLOCKS * QUERY_BLOCK
        if not (fits and visible is None and not dropout and torch.compiler.is_compiling()):
            return super().__call__(query, key, value, visible, dropout, bias)
        share = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(share, 2) if share > 1 else tensor for tensor in (key, value))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        parts = enumerate(query.split(QUERY_BLOCK, 2))
        scale = self.scores.scale or query.shape[-1] ** -0.5
        blocks = [_last_queries(part, key, value, QUERY_BLOCK * number, scale) for number, part in parts]
        return torch.cat(blocks, dim=2).transpose(1, 2)


def _last_queries(query: Tensor, key: Tensor, value: Tensor, start: int, scale: float) -> Tensor:
    """Attention of queries [b, n, s, d], whose first column is `start`, over keys and values [b, n, k, d]."""
    end = start + query.shape[2]
    columns = torch.arange(end, device=query.device)
    scores = (query @ key[:, :, :end].transpose(-1, -2)).float() * scale
    weights = scores.masked_fill(columns[start:].unsqueeze(1) < columns, float("-inf")).softmax(-1)
    mixed: Tensor = weights.to(query.dtype) @ value[:, :, :end]
    return mixed


class FlashAttention(ScaledDotProduct):
    """flash_attn_func of the package flash-attn (https://arxiv.org/abs/2307.08691).

    fp32 and left-padded batches, which it does not support, use torch's kernel.
    """

    source = "of the package flash-attn"

    def __init__(self, function: Callable[..., Tensor], scores: Scores = Scores()) -> None:
        """function: flash_attn.flash_attn_func."""
        super().__init__(scores=scores)
        self.function = function

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        if dtype not in FLASH_TYPES:
            other = super().describe(dtype)
            return f"{other}, because flash-attn needs fp16 or bf16 and this is {str(dtype).removeprefix('torch.')}"
        return f"flash_attn_func {self.source}" + (f", scores {self.scores.describe()}" if self.scores.composed else "")

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, bias: Bias = None
    ) -> Tensor:
        """Attend; see `Attend`. The bias must have slopes."""
        if visible is not None or query.dtype not in FLASH_TYPES:
            return super().__call__(query, key, value, visible, dropout, bias)
        options = self._options()
        if bias is not None:
            options["alibi_slopes"] = bias.slopes()
        return self.function(query, key, value, dropout_p=dropout, **options)

    def _options(self) -> dict[str, Any]:
        """What the function takes beside tensors; older versions have no cap."""
        options = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
        changes = {"softmax_scale": self.scores.scale, "softcap": self.scores.softcap}
        return options | {name: value for name, value in changes.items() if value is not None}


class FlashAttention3(FlashAttention):
    """flash_attn_func of FlashAttention-3 (https://arxiv.org/abs/2407.08608), for Hopper, without dropout and bias."""

    source = "of FlashAttention-3"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, bias: Bias = None
    ) -> Tensor:
        """Attend; see `Attend`."""
        if visible is not None or query.dtype not in FLASH_TYPES or dropout or bias is not None:
            return ScaledDotProduct.__call__(self, query, key, value, visible, dropout, bias)
        mixed: Tensor | tuple[Tensor, Tensor] = self.function(query, key, value, **self._options())
        return mixed[0] if isinstance(mixed, tuple) else mixed  # some versions also return the softmax's log-sum-exp


class FlexAttention(ScaledDotProduct):
    """torch's FlexAttention (https://arxiv.org/abs/2412.05496) within documents or a window, or of changed scores.

    It skips blocks that no query sees and needs no s x s mask or bias. Without a block mask (in decoding, or where it
    would skip and change nothing) `ScaledDotProduct` computes.
    """

    def __init__(self, window: int | None = None, compiled: bool = True, scores: Scores = Scores()) -> None:
        """window: keys that a query sees, its own included. compiled: False computes all s x s scores, for tests."""
        super().__init__(window, scores=scores)
        self.function: Any = _compiled_flex_attention() if compiled else flex_attention

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        window = f" with a window of {self.window} tokens" if self.window else ""
        return f"torch's FlexAttention{window}" + (f", scores {self.scores.describe()}" if self.scores.composed else "")

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Visible, dropout: float, bias: Bias = None
    ) -> Tensor:
        """Attend; see `Attend`. Dropout is not supported."""
        if not isinstance(visible, BlockMask):
            return super().__call__(query, key, value, visible, dropout, bias)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        options: dict[str, Any] = {"block_mask": visible, "enable_gqa": query.shape[1] != key.shape[1]}
        if self.scores.scale is not None:
            options["scale"] = self.scores.scale
        if self.scores.composed:
            options["score_mod"] = _change_of_scores(self.scores.softcap, bias, key.shape[2])
        mixed: Tensor = self.function(query, key, value, **options)
        return mixed.transpose(1, 2)


def _change_of_scores(softcap: float | None, bias: Bias, keys: int) -> Callable[..., Tensor]:
    """FlexAttention's `score_mod`, a function of a scaled score and its indices."""
    table, of_keys = (None, False) if bias is None else (bias(keys), bias.of_keys)

    def changed(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if table is None:
            return score
        return score + table[head, key if of_keys else (query - key).clamp(min=0)]

    return changed


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    """One function for all layers, compiled for each shape and window."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
    # wrapped, so that selective recomputation sees it as one operation, whose results it can store
    options: Any = {"wrap_inductor_compiled_regions": True}
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, options=options)
    return compiled
