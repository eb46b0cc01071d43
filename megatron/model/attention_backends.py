"""The kernels that compute softmax(query key^T / sqrt(d)) value.

Shapes: b micro-batch, s queries, k keys (k >= s; the queries are the last s of them), n query heads and g key/value
heads on this rank, d head size.
A backend is `build(model, device) -> Attend`.
"""

import contextlib
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megatron.config.plan import ModelPlan
from megatron.model.cache import Positions
from megatron.model.document_mask import document_blocks

_SDPA = "torch's scaled_dot_product_attention"
QUERY_BLOCK, MOST_BLOCKS = 128, 16
SMALLEST_FLEX_HEAD = 16  # on a GPU
HOPPER = (9, 0)  # the architecture of FlashAttention-3
_FLASH_TYPES = (torch.float16, torch.bfloat16)


class Attend(Protocol):
    """An attention kernel for one layer."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Query [b, s, n, d], key and value [b, k, g, d] -> [b, s, n, d].

        positions: None: the queries are the last of the keys and see all keys up to their own.
        dropout: probability of dropping an attention weight.
        """
        ...

    def describe(self, dtype: torch.dtype) -> str:
        """The kernel used for tensors of `dtype` and the reason, for the start-up line."""
        ...


class ScaledDotProduct:
    """torch's scaled_dot_product_attention, which chooses a flash, memory-efficient or plain kernel."""

    def __init__(self, window: int | None = None, reason: str = "") -> None:
        """window: keys that a query sees, its own included; None: all before it. reason: for `describe`."""
        self.window, self.reason = window, reason

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        window = f" with a window of {self.window} tokens" if self.window else ""
        return _SDPA + window + (f", because {self.reason}" if self.reason else "")

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Attend; see `Attend`."""
        queries, keys = query.shape[1], key.shape[1]
        if positions is None and (queries not in (1, keys) or (self.window or keys) < keys):
            columns = torch.arange(keys, device=query.device).unsqueeze(0)
            positions = Positions(columns[:, keys - queries :], columns)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=positions.visible(self.window) if positions else None,
            dropout_p=dropout,
            is_causal=positions is None and queries > 1,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return mixed.transpose(1, 2)


class QueryBlocks(ScaledDotProduct):
    """Causal attention as matrix products of query blocks with the keys before them, for compiled code on a CPU.

    torch's kernel takes 1.5 to 2 times as long there. Half of the s x s scores are stored for the backward pass, so
    long sequences use torch's kernel, as does everything that is not compiled.
    """

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        return f"{super().describe(dtype)}, compiled: blocks of {QUERY_BLOCK} queries"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Attend; see `Attend`."""
        length = query.shape[1]
        fits = length == key.shape[1] and length % QUERY_BLOCK == 0 and length <= MOST_BLOCKS * QUERY_BLOCK
        if not (fits and positions is None and not dropout and torch.compiler.is_compiling()):
            return super().__call__(query, key, value, positions, dropout)
        share = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(share, 2) if share > 1 else tensor for tensor in (key, value))
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        parts = enumerate(query.split(QUERY_BLOCK, 2))
        blocks = [_last_queries(part, key, value, QUERY_BLOCK * number) for number, part in parts]
        return torch.cat(blocks, dim=2).transpose(1, 2)


def _last_queries(query: Tensor, key: Tensor, value: Tensor, start: int) -> Tensor:
    """Attention of queries [b, n, s, d], whose first column is `start`, over keys and values [b, n, k, d]."""
    end = start + query.shape[2]
    columns = torch.arange(end, device=query.device)
    scores = (query @ key[:, :, :end].transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    weights = scores.masked_fill(columns[start:].unsqueeze(1) < columns, float("-inf")).softmax(-1)
    mixed: Tensor = weights.to(query.dtype) @ value[:, :, :end]
    return mixed


class FlashAttention(ScaledDotProduct):
    """flash_attn_func of the package flash-attn (https://arxiv.org/abs/2307.08691).

    fp32 and left-padded batches, which it does not support, use torch's kernel.
    """

    source = "of the package flash-attn"

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """function: flash_attn.flash_attn_func."""
        super().__init__()
        self.function = function

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        if dtype not in _FLASH_TYPES:
            return f"{_SDPA}, because flash-attn needs fp16 or bf16 and this is {str(dtype).removeprefix('torch.')}"
        return f"flash_attn_func {self.source}"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Attend; see `Attend`."""
        if positions is not None or query.dtype not in _FLASH_TYPES:
            return super().__call__(query, key, value, positions, dropout)
        same_bits = torch.are_deterministic_algorithms_enabled()
        return self.function(query, key, value, dropout_p=dropout, causal=True, deterministic=same_bits)


class FlashAttention3(FlashAttention):
    """flash_attn_func of FlashAttention-3 (https://arxiv.org/abs/2407.08608), for Hopper, without dropout."""

    source = "of FlashAttention-3"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Attend; see `Attend`."""
        if positions is not None or query.dtype not in _FLASH_TYPES or dropout:
            return ScaledDotProduct.__call__(self, query, key, value, positions, dropout)
        same_bits = torch.are_deterministic_algorithms_enabled()
        mixed: Tensor | tuple[Tensor, Tensor] = self.function(query, key, value, causal=True, deterministic=same_bits)
        return mixed[0] if isinstance(mixed, tuple) else mixed  # some versions also return the softmax's log-sum-exp


class FlexAttention(ScaledDotProduct):
    """torch's FlexAttention (https://arxiv.org/abs/2412.05496) within documents or a window.

    It skips blocks that no query sees and needs no s x s mask. Everything else uses scaled_dot_product_attention.
    """

    def __init__(self, window: int | None = None, compiled: bool = True) -> None:
        """window: keys that a query sees, its own included. compiled: False computes all s x s scores, for tests."""
        super().__init__(window)
        self.function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        return f"torch's FlexAttention{f' with a window of {self.window} tokens' if self.window else ''}"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Attend; see `Attend`. Dropout is not supported."""
        first = self._first_seen(query, key, positions)
        if first is None:
            return super().__call__(query, key, value, positions, dropout)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        blocks = document_blocks(first, self.window)
        mixed: Tensor = self.function(query, key, value, block_mask=blocks, enable_gqa=query.shape[1] != key.shape[1])
        return mixed.transpose(1, 2)

    def _first_seen(self, query: Tensor, key: Tensor, positions: Positions | None) -> Tensor | None:
        """The first key that each query sees, ignoring the window, [b, s]; None: this kernel would skip nothing."""
        if positions is not None:
            return positions.first
        # each length of a prompt would compile again; training has one length
        if self.window is None or not torch.is_grad_enabled() or key.shape[1] <= self.window:
            return None
        return torch.zeros(query.shape[:2], dtype=torch.int32, device=query.device)


def global_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to all earlier tokens, by torch."""
    return _by_blocks(model, device) or (QueryBlocks() if device.type == "cpu" else ScaledDotProduct())


def local_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to the last `sliding_window` tokens, by torch: in blocks on a GPU, otherwise with a mask."""
    return _by_blocks(model, device, model.sliding_window) or ScaledDotProduct(model.sliding_window)


def flash_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to all earlier tokens, by the package flash-attn if it can run, otherwise by torch."""
    if (attend := _by_blocks(model, device)) is not None:
        return attend
    if device.type != "cuda":
        return QueryBlocks(reason=f"flash-attn needs a GPU and this is the {device.type.upper()}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return ScaledDotProduct(reason=f"flash-attn needs Ampere or newer, not {torch.cuda.get_device_name(device)}")
    if model.head_size > 256:
        return ScaledDotProduct(reason=f"flash-attn takes heads of at most 256 and these are {model.head_size}")
    if torch.cuda.get_device_capability(device) == HOPPER and not model.attention_dropout:
        with contextlib.suppress(ImportError):
            from flash_attn_interface import flash_attn_func as flash_attn_3_func

            return FlashAttention3(flash_attn_3_func)
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:  # not installed, or built for another torch
        return ScaledDotProduct(reason=f"flash-attn cannot be imported: {error}")
    return FlashAttention(flash_attn_func)


def _by_blocks(model: ModelPlan, device: torch.device, window: int | None = None) -> Attend | None:
    """FlexAttention if the model masks documents or uses a window on a GPU; otherwise None."""
    if device.type != "cuda" or not (model.reset_attention_mask or (window and not model.attention_dropout)):
        return None
    if model.head_size < SMALLEST_FLEX_HEAD:
        reason = f"FlexAttention takes heads of at least {SMALLEST_FLEX_HEAD} and these are {model.head_size}"
        return ScaledDotProduct(window, f"with a mask of s x s: {reason}")
    return FlexAttention(window)
