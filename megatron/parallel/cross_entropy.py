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


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of the vocabulary on this rank: ids from `start`, of which the first `rows` are no padding."""

    group: dist.ProcessGroup
    start: int
    rows: int


class Kernels(NamedTuple):
    """The operations on the logits of a chunk, which torch.compile can fuse."""

    reduce: Callable[[Tensor], tuple[Tensor, Tensor]]
    differentiate: Callable[[Tensor, Tensor, Tensor], None]


def reduce_logits(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each token [c], and the sum of exp(logit - largest) [c]; in fp32."""
    # clamp, because -inf - -inf is NaN where all columns are padding
    largest = logits.amax(-1).float().clamp(min=torch.finfo(torch.float32).min)
    return largest, (logits - largest.unsqueeze(-1)).exp_().sum(-1)


def replace_logits(logits: Tensor, log_sum: Tensor, factor: Tensor) -> None:
    """Replace logits [c, v/tp] by factor * softmax. log_sum: [c], fp32. factor: [c], fp32."""
    logits.copy_((logits - log_sum.unsqueeze(-1)).exp_().mul_(factor.unsqueeze(-1)))


EAGER = Kernels(reduce_logits, replace_logits)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weights: Tensor,
    shard: VocabularyShard,
    kernels: Kernels = EAGER,
) -> Tensor:
    """The sum over tokens of loss weight * negative log likelihood of the label in nats, a scalar in fp32.

    hidden: [..., h], the same on every rank; its gradient is this rank's summand. weight: [v/tp, h] of the same type;
    logits are hidden @ weight.T, -inf for padding. labels: [...] int64, valid ids. loss_weights: [...] fp32.
    One small all-gather for each chunk, if there are several ranks.
    """
    hidden, labels, loss_weights = hidden.flatten(0, -2), labels.flatten(), loss_weights.flatten()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, loss_weights, shard, kernels)
        return loss
    return (_in_chunks(hidden, weight, labels, None, shard, kernels)[0] * loss_weights).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weights: Tensor,
        shard: VocabularyShard,
        kernels: Kernels,
    ) -> Tensor:
        ctx.shard, ctx.kernels = shard, kernels
        # fp16 could not hold the gradients without the loss scale, which is known in the backward pass only
        ctx.known = hidden.dtype != torch.float16
        factors = loss_weights if ctx.known else None
        losses, *gradients = _in_chunks(hidden, weight, labels, factors, shard, kernels)
        ctx.save_for_backward(*(gradients if ctx.known else (hidden, weight, labels, loss_weights)))
        return (losses * loss_weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.known:  # in place, as autograd refuses a second backward pass over saved tensors that were changed
            of_hidden, of_weight = (saved.mul_(gradient) for saved in ctx.saved_tensors)
        else:
            hidden, weight, labels, loss_weights = ctx.saved_tensors
            factors = loss_weights * gradient
            _, of_hidden, of_weight = _in_chunks(hidden, weight, labels, factors, ctx.shard, ctx.kernels)
        return of_hidden, of_weight, None, None, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, factors: Tensor | None, shard: VocabularyShard, kernels: Kernels
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Negative log likelihoods [t] in fp32, and the gradients of their sum weighted by `factors` [t], unless None.

    Those are of hidden, and of weight in its type or, summed over several chunks, in fp32.
    """
    tokens, columns = len(hidden), labels - shard.start
    elsewhere = (columns < 0) | (columns >= len(weight))
    columns = columns.masked_fill(elsewhere, 0)
    length = loss_chunk(tokens, weight.shape[1], kernels is not EAGER, on_cpu=hidden.device.type == "cpu")
    rows = torch.arange(length, device=hidden.device)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    of_hidden = torch.empty_like(hidden)
    # one product is rounded once; a sum of several is taken in fp32
    of_weight = torch.empty_like(weight, dtype=weight.dtype if length >= tokens else torch.float32)
    for start in range(0, tokens, length):
        part = slice(start, start + length)
        logits = hidden[part] @ weight.t()
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
        log_sum, factor = largest + total.log(), factors[part]
        kernels.differentiate(logits, log_sum, factor)
        # softmax - 1 at the label, by expm1, as the softmax is often almost 1
        of_label = (torch.expm1(own - log_sum) * factor).to(logits.dtype)
        logits[place] = torch.where(elsewhere[part], logits[place], of_label)
        torch.mm(logits, weight, out=of_hidden[part])
        _add_product(of_weight, logits.t(), hidden[part], is_first=start == 0)
        del logits  # before the next chunk's are allocated
    return (losses, None, None) if factors is None else (losses, of_hidden, of_weight)


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
