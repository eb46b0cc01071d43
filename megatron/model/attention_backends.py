"""Which kernel computes the attention of a layer: each kind of attention is `build(model, device) -> Attend`.

The kernels are in attention_kernels.py.
"""

import contextlib

import torch
from torch.nn.attention import SDPBackend

from megatron.config.plan import ModelPlan
from megatron.model.attention_kernels import (
    Attend,
    FlashAttention,
    FlashAttention3,
    FlexAttention,
    QueryBlocks,
    ScaledDotProduct,
    Scores,
)
from megatron.model.composed_attention import QUERY_BLOCK
from megatron.registry import resolve

SMALLEST_FLEX_HEAD = 16  # on a GPU
HOPPER = (9, 0)  # the architecture of FlashAttention-3
_KERNELS = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "plain",
}


def block_windows(model: ModelPlan, device: torch.device) -> tuple[int | None, ...]:
    """The windows of the model's layers that attend by blocks; None: all earlier tokens."""
    kernels = [resolve("attention_backend", kind)(model, device) for kind in dict.fromkeys(model.attention_kinds)]
    return tuple(dict.fromkeys(kernel.window for kernel in kernels if isinstance(kernel, FlexAttention)))


def global_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to all earlier tokens, by torch."""
    return _by_blocks(model, device) or _by_torch(model, device)


def local_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to the last `sliding_window` tokens, by torch: in blocks on a GPU, otherwise with a mask."""
    window = model.sliding_window
    return _by_blocks(model, device, window) or ScaledDotProduct(window, scores=Scores.of(model))


def flash_attention(model: ModelPlan, device: torch.device) -> Attend:
    """Attention to all earlier tokens, by the fastest kernel for the GPU.

    On Hopper FlashAttention-3 if it is installed, else torch's cuDNN kernel if it can run (about twice as fast as
    flash-attn 2, https://github.com/pytorch/pytorch/issues/142132); elsewhere the package flash-attn; else torch's.
    Capped scores and ALiBi are for flash-attn too, a cap alone for FlashAttention-3; else torch's FlexAttention, or
    blocks of queries with dropout.
    """
    scores = Scores.of(model)
    if model.reset_attention_mask and (attend := _by_blocks(model, device)) is not None:
        return attend
    if device.type != "cuda":
        return _by_torch(model, device, f"flash-attn needs a GPU and this is the {device.type.upper()}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return _otherwise(model, device, f"flash-attn needs Ampere or newer, not {torch.cuda.get_device_name(device)}")
    if model.head_size > 256:
        return _otherwise(model, device, f"flash-attn takes heads of at most 256 and these are {model.head_size}")
    if scores.softcap is not None and model.attention_dropout:
        return _otherwise(model, device, "flash-attn has no dropout of capped scores")
    if scores.biased and model.position_embedding != "alibi":
        return _otherwise(model, device, f"flash-attn has no bias for pos_emb {model.position_embedding}")
    if capability == HOPPER and not model.attention_dropout and not scores.biased:
        with contextlib.suppress(ImportError):
            from flash_attn_interface import flash_attn_func as flash_attn_3_func

            return FlashAttention3(flash_attn_3_func, scores)
    if not scores.composed and torch_kernel(model, device, torch.bfloat16) == SDPBackend.CUDNN_ATTENTION:
        return _by_torch(model, device, "cuDNN is faster than flash-attn 2 on this GPU")
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:  # not installed, or built for another torch
        return _otherwise(model, device, f"flash-attn cannot be imported: {error}")
    return FlashAttention(flash_attn_func, scores)


def _otherwise(model: ModelPlan, device: torch.device, reason: str) -> Attend:
    """What computes on a GPU on which flash-attn does not."""
    return _by_blocks(model, device) or _by_torch(model, device, reason)


def _by_torch(model: ModelPlan, device: torch.device, reason: str = "") -> ScaledDotProduct:
    """Attention to all earlier tokens by torch."""
    scores = Scores.of(model)
    if device.type != "cuda" and not scores.composed:
        return QueryBlocks(reason=reason, scores=scores)
    kernel = None if scores.composed else lambda dtype: _KERNELS[torch_kernel(model, device, dtype)]
    return ScaledDotProduct(reason=reason, kernel=kernel, scores=scores)


def torch_kernel(model: ModelPlan, device: torch.device, dtype: torch.dtype) -> SDPBackend:
    """The kernel that torch itself chooses to train with causal attention: it knows its own limits.

    cuDNN's are, in torch 2.11 to 2.13: Hopper or Blackwell, cuDNN 9.15.1, heads of at most 128 and a multiple of 8,
    dropout in sixteenths, and no deterministic algorithms.
    """
    query, key = (
        torch.empty(1, count, QUERY_BLOCK, model.head_size, dtype=dtype, device=device, requires_grad=True)
        for count in (model.num_attention_heads, model.num_kv_heads)
    )
    grouped = model.num_attention_heads != model.num_kv_heads
    return SDPBackend(torch._fused_sdp_choice(query, key, key, None, model.attention_dropout, True, enable_gqa=grouped))


def _by_blocks(model: ModelPlan, device: torch.device, window: int | None = None) -> Attend | None:
    """FlexAttention if the model masks documents, uses a window or changes scores on a GPU; otherwise None."""
    scores = Scores.of(model)
    without_dropout = not model.attention_dropout and (window or scores.composed)
    if device.type != "cuda" or not (model.reset_attention_mask or without_dropout):
        return None
    if model.head_size < SMALLEST_FLEX_HEAD:
        size = f"FlexAttention takes heads of at least {SMALLEST_FLEX_HEAD} and these are {model.head_size}"
        return ScaledDotProduct(window, size if scores.composed else f"with a mask of s x s: {size}", scores=scores)
    return FlexAttention(window, scores=scores)
