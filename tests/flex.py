"""FlexAttention on a CPU, where torch computes all s x s scores from the block mask, here with gradients too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from megatron.config.plan import ModelPlan
from megatron.model.attention_kernels import FlexAttention, Scores
from megatron.registry import TABLE

NAMES = {"flex": "tests.flex:flex_attention", "local_flex": "tests.flex:local_flex_attention"}


@contextmanager
def registered() -> Iterator[None]:
    """The kinds of attention "flex" and "local_flex" (with a window) can be resolved."""
    TABLE["attention_backend"].update(NAMES)
    try:
        yield
    finally:
        for name in NAMES:
            del TABLE["attention_backend"][name]


def _unchanged(score: Tensor, *_: Any) -> Tensor:
    return score


def plain_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask,
    enable_gqa: bool,
    scale: float | None = None,
    score_mod: Callable[..., Tensor] = _unchanged,
) -> Tensor:
    """torch's operator itself: the function around it refuses tensors that need a gradient on a CPU."""
    mask, scale = block_mask.as_tuple(), scale or query.shape[-1] ** -0.5
    mixed: Tensor = torch.ops.higher_order.flex_attention(query, key, value, score_mod, mask, scale, {})[0]
    return mixed


def flex_attention(model: ModelPlan, device: torch.device) -> FlexAttention:
    """To all earlier tokens."""
    return on_cpu(None, Scores.of(model))


def local_flex_attention(model: ModelPlan, device: torch.device) -> FlexAttention:
    """To the last `sliding_window` tokens."""
    return on_cpu(model.sliding_window, Scores.of(model))


def on_cpu(window: int | None, scores: Scores) -> FlexAttention:
    """The kernel for one layer."""
    attend = FlexAttention(window, compiled=False, scores=scores)
    attend.function = plain_flex_attention
    return attend
