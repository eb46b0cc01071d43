"""The loss of the last hidden states, without the logits of the whole batch.

Shapes: t tokens, h hidden, v vocabulary in memory, tp ranks of the group, c tokens of a chunk.
The logits of one chunk of tokens at a time are computed, reduced to the loss of each token, and replaced by their
gradient, from which the gradients of hidden states and weight follow at once (Liger-Kernel,
https://arxiv.org/abs/2410.10989). The backward pass only multiplies them by the incoming gradient, except in fp16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.config.widths import loss_chunk
from megatron.parallel.packed_weights import PackedWeight
from megatron.parallel.products import linear


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the vocabulary on this rank: ids from `start`, of which the first `rows` are no padding."""

    group: dist.ProcessGroup
    start: int
    rows: int


class LogitTransform(NamedTuple):
    """What is done to the products of hidden states and weight (plus bias): a factor, then a cap."""

    multiplier: float = 1.0
    cap: float | None = None  # c of c * tanh(logits / c)


UNCHANGED = LogitTransform()


class Kernels(NamedTuple):
    """The operations on the logits of a chunk, which torch.compile can fuse."""

    transform: Callable[[Tensor, LogitTransform], Tensor]
    reduce: Callable[[Tensor], tuple[Tensor, Tensor]]
    differentiate: Callable[[Tensor, Tensor, Tensor, float | None], None]


def transform_logits(logits: Tensor, transform: LogitTransform) -> Tensor:
    """Logits times the multiplier, and c * tanh(logits / c) of that with a cap, in fp32 and rounded once."""
    if transform.cap is None:
        return logits * transform.multiplier
    return (torch.tanh(logits.float() * (transform.multiplier / transform.cap)) * transform.cap).to(logits.dtype)


def reduce_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each token [c], and the sum of exp(logit - largest) [c]; in fp32."""
    # clamp, because -inf - -inf is NaN where all columns are padding
    largest = logits.amax(-1).float().clamp(min=torch.finfo(torch.float32).min)
    return largest, (logits - largest.unsqueeze(-1)).exp_().sum(-1)


def replace_logits(logits: Tensor, log_sum: Tensor, factor: Tensor, cap: float | None) -> None:
    """Replace logits [c, v/tp] by factor * softmax, times the slope of the cap. log_sum, factor: [c], fp32."""
    gradient = (logits - log_sum.unsqueeze(-1)).exp_().mul_(factor.unsqueeze(-1))
    logits.copy_(gradient if cap is None else gradient.mul_(slope_of_cap(logits, cap)))


def slope_of_cap(logits: Tensor, cap: float) -> Tensor:
    """The derivative of cap * tanh(x / cap), from its result: 1 - (result / cap)^2, and 0 for -inf; fp32."""
    return 1 - (logits.float() / cap).clamp_(min=-1).square_()


EAGER = Kernels(transform_logits, reduce_logits, replace_logits)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    labels: Tensor,
    loss_weights: Tensor,
    shard: VocabularyShard,
    kernels: Kernels = EAGER,
    bias: Tensor | None = None,
    transform: LogitTransform = UNCHANGED,
) -> Tensor:
    """The sum over tokens of loss weight * negative log likelihood of the label in nats, a scalar in fp32.

    hidden: [..., h], the same on every rank; its gradient is this rank's summand. weight: [v/tp, h] and bias: [v/tp],
    of the same type; logits are transform(hidden @ weight.T + bias), -inf for padding. labels: [...] int64, valid ids.
    loss_weights: [...] fp32. One small all-gather for each chunk, if there are several ranks.
    """
    head = Head(weight, bias, transform, shard, kernels, weight.requires_grad)
    hidden, labels, loss_weights = hidden.flatten(0, -2), labels.flatten(), loss_weights.flatten()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, loss_weights, head)
        return loss
    return (_in_chunks(hidden, labels, None, head).losses * loss_weights).sum()


class Head(NamedTuple):
    """The last layer, on this rank."""

    weight: Tensor | PackedWeight
    bias: Tensor | None
    transform: LogitTransform
    shard: VocabularyShard
    kernels: Kernels
    trains: bool  # whether the gradient of the weight is wanted


class Results(NamedTuple):
    """Negative log likelihoods [t] in fp32, and the gradients of their weighted sum, or None."""

    losses: Tensor
    of_hidden: Tensor | None = None
    of_weight: Tensor | None = None
    of_bias: Tensor | None = None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_weights: Tensor,
        head: Head,
    ) -> Tensor:
        # without the tensors, which are saved below so that autograd sees changes of them
        ctx.head = head._replace(weight=None, bias=None)  # type: ignore[arg-type]
        # fp16 could not hold the gradients without the loss scale, which is known in the backward pass only
        ctx.known = hidden.dtype != torch.float16
        losses, *gradients = _in_chunks(hidden, labels, loss_weights if ctx.known else None, head)
        ctx.save_for_backward(*(gradients if ctx.known else (hidden, weight, bias, labels, loss_weights)))
        return (losses * loss_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known:  # in place, as autograd refuses a second backward pass over saved tensors that were changed
            gradients = [None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors]
        else:
            hidden, weight, bias, labels, loss_weights = ctx.saved_tensors
            head = ctx.head._replace(weight=weight, bias=bias)
            _, *gradients = _in_chunks(hidden, labels, loss_weights * gradient, head)
        return *gradients, None, None, None


def _in_chunks(hidden: Tensor, labels: Tensor, factors: Tensor | None, head: Head) -> Results:
    """Losses, and the gradients of their sum weighted by `factors` [t], unless None.

    That of hidden has its type, that of weight its type or, summed over several chunks, fp32, that of bias fp32.
    """
    weight, bias, transform, shard, kernels, trains = head
    tokens, columns = len(hidden), labels - shard.start
    elsewhere = (columns < 0) | (columns >= len(weight))
    columns = columns.masked_fill(elsewhere, 0)
    length = loss_chunk(tokens, weight.shape[1], kernels is not EAGER, on_cpu=hidden.device.type == "cpu")
    rows = torch.arange(length, device=hidden.device)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    of_hidden = torch.empty_like(hidden)
    # one product is rounded once; a sum of several is taken in fp32
    of_weight = None
    if trains and isinstance(weight, Tensor):
        of_weight = torch.empty_like(weight, dtype=weight.dtype if length >= tokens else torch.float32)
    of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    for start in range(0, tokens, length):
        part = slice(start, start + length)
        logits = linear(hidden[part], weight, bias)
        if transform != UNCHANGED:
            logits = kernels.transform(logits, transform)
        logits[:, shard.rows :] = float("-inf")
        place = rows[: len(logits)], columns[part]
        own = logits[place].float().masked_fill(elsewhere[part], 0)
        largest, total = kernels.reduce(logits)
        if dist.get_world_size(shard.group) > 1:
            largest, total, own = _combine(largest, total, own, shard.group)
        # subtract the largest logit first: the difference is exact where logits are large
        losses[part] = total.log() - (own - largest)
        if factors is None:
            continue
        assert isinstance(weight, Tensor)  # a packed one has no gradient
        log_sum, factor = largest + total.log(), factors[part]
        if transform.multiplier != 1.0:
            factor = factor * transform.multiplier
        kernels.differentiate(logits, log_sum, factor, transform.cap)
        # softmax - 1 at the label, by expm1, as the softmax is often almost 1
        of_label = torch.expm1(own - log_sum) * factor
        if transform.cap is not None:
            of_label = of_label * slope_of_cap(own, transform.cap)
        logits[place] = torch.where(elsewhere[part], logits[place], of_label.to(logits.dtype))
        torch.mm(logits, weight, out=of_hidden[part])
        if of_weight is not None:
            _add_product(of_weight, logits.t(), hidden[part], is_first=start == 0)
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=torch.float32)
        del logits  # before the next chunk's are allocated
    return Results(losses) if factors is None else Results(losses, of_hidden, of_weight, of_bias)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Add left @ right to `total`, of the same type or fp32; without reading it if this is the first product."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0 if is_first else 1)
    elif total.is_cuda:
        torch.addmm(total, left, right, total.dtype, beta=0 if is_first else 1, out=total)
    elif is_first:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)


def _combine(largest: Tensor, total: Tensor, own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the ranks' results; own [c] is the label's logit, 0 on every rank except the one that has it."""
    mine = torch.stack([largest, total, own])
    all_ranks = mine.new_empty((dist.get_world_size(group), *mine.shape))
    dist.all_gather_into_tensor(all_ranks.flatten(0, 1), mine, group=group)
    largest_of_all = all_ranks[:, 0].amax(0)
    totals = (all_ranks[:, 1] * (all_ranks[:, 0] - largest_of_all).exp()).sum(0)
    return largest_of_all, totals, all_ranks[:, 2].sum(0)
