"""The kernels that compute softmax(query key^T / sqrt(d)) value.

Shapes: b micro-batch, s queries, k keys (k >= s; the queries are the last s of them), n query heads and g key/value
heads on this rank, d head size.
A backend is `build(model, device) -> Attend`. Floor 3.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.model.cache import Positions

_SDPA = "torch's scaled_dot_product_attention"
_FLASH_TYPES = (torch.float16, torch.bfloat16)


class Attend(Protocol):
    """A kernel, ready for one layer's tensors."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Query [b, s, n, d], key and value [b, k, g, d] -> [b, s, n, d].

        positions: None if the queries stand at the end of the keys and see all keys up to their own.
        dropout: probability with which an attention weight is dropped.
        """
        ...

    def describe(self, dtype: torch.dtype) -> str:
        """What computes for tensors of `dtype`, and why: for the start-up line."""
        ...


class ScaledDotProduct:
    """torch's scaled_dot_product_attention, which chooses among its own flash, memory-efficient and plain kernels."""

    def __init__(self, window: int | None = None, reason: str = "") -> None:
        """window: keys that a query sees, itself included; None: all that came before."""
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
            places = torch.arange(keys, device=query.device).unsqueeze(0)
            positions = Positions(places[:, keys - queries :], places)
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


class FlashAttention(ScaledDotProduct):
    """flash_attn_func of the package flash-attn (https://arxiv.org/abs/2307.08691).

    What it cannot do goes through torch's kernel: fp32, and left-padded batches, which it has no mask for.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        """function: flash_attn.flash_attn_func."""
        super().__init__()
        self.function = function

    def describe(self, dtype: torch.dtype) -> str:
        """Say what computes; see `Attend`."""
        if dtype not in _FLASH_TYPES:
            return f"{_SDPA}, because flash-attn needs fp16 or bf16 and this is {str(dtype).removeprefix('torch.')}"
        return "flash_attn_func of the package flash-attn"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions | None, dropout: float
    ) -> Tensor:
        """Attend; see `Attend`."""
        if positions is not None or query.dtype not in _FLASH_TYPES:
            return super().__call__(query, key, value, positions, dropout)
        return self.function(query, key, value, dropout_p=dropout, causal=True)


def global_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to all tokens before, by torch."""
    return ScaledDotProduct()


def local_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to the last `sliding_window` tokens, by torch with a mask."""
    return ScaledDotProduct(model.sliding_window)


def flash_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to all tokens before, by the package flash-attn where it can run, else by torch."""
    if device.type != "cuda":
        return ScaledDotProduct(reason=f"flash-attn needs a GPU and this is the {device.type.upper()}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return ScaledDotProduct(reason=f"flash-attn needs Ampere or newer, not {torch.cuda.get_device_name(device)}")
    if model.head_size > 256:
        return ScaledDotProduct(reason=f"flash-attn takes heads of at most 256 and these are {model.head_size}")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:  # not there, or built for another torch
        return ScaledDotProduct(reason=f"flash-attn cannot be imported: {error}")
    return FlashAttention(flash_attn_func)
