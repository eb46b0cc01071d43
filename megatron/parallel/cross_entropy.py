"""Cross entropy of logits that are sharded along the vocabulary.

Shapes: b micro-batch, s sequence, v vocabulary in memory, tp ranks of the group, t tokens = b * s.
Forward and backward process the tokens in chunks, so that neither fp32 logits nor the softmax of the whole batch is
stored; backward recomputes the softmax from the logits and one number per token. Under torch.compile a chunk is the
whole batch, because the compiled kernels store no intermediate logits.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 2**24  # of a chunk; 64 MiB in fp32


def vocab_parallel_nll(logits: Tensor, labels: Tensor, group: dist.ProcessGroup, vocab_start: int) -> Tensor:
    """Negative log likelihood of every label, in nats.

    logits: [b, s, v/tp], this rank's columns, of any floating type; -inf where a column is padding.
    labels: [b, s] int64, token ids. vocab_start: the id of this rank's first column.
    Returns [b, s] fp32 on every rank. Two all-reduces of [b, s] forward, none backward.
    """
    losses: Tensor = _VocabParallelNLL.apply(logits, labels, group, vocab_start)
    return losses


class _VocabParallelNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, vocab_start: int) -> Tensor:
        flat, column = logits.flatten(0, -2), labels.flatten() - vocab_start
        elsewhere = (column < 0) | (column >= flat.shape[-1])
        column = column.masked_fill(elsewhere, 0)
        own = flat.gather(-1, column.unsqueeze(-1)).squeeze(-1).float().masked_fill(elsewhere, 0)
        parts = map(_largest_and_total, flat.split(_rows(flat)))
        largest, total = (torch.cat(part) for part in zip(*parts, strict=True))
        if dist.get_world_size(group) > 1:
            largest, total, own = _combine(largest, total, own, group)
        ctx.save_for_backward(logits, column, elsewhere, own, largest + total.log())
        # subtract the largest logit first: the difference is exact where logits are large
        return (total.log() - (own - largest)).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, column, elsewhere, own, log_sum = ctx.saved_tensors
        flat, scale = logits.flatten(0, -2), gradient.flatten()
        result = torch.empty_like(flat, memory_format=torch.contiguous_format)
        parts = zip(*(tensor.split(_rows(logits)) for tensor in (flat, log_sum, scale, result)), strict=True)
        for chunk, normaliser, factor, target in parts:
            target.copy_((chunk.float() - normaliser.unsqueeze(-1)).exp_().mul_(factor.unsqueeze(-1)))
        # softmax - 1 at the label, by expm1, as the softmax is often almost 1
        of_label = (torch.expm1(own - log_sum) * scale).to(result.dtype).unsqueeze(-1)
        column, elsewhere = column.unsqueeze(-1), elsewhere.unsqueeze(-1)
        result.scatter_(-1, column, torch.where(elsewhere, result.gather(-1, column), of_label))
        return result.view(logits.shape), None, None, None


def _rows(logits: Tensor) -> int:
    """Number of tokens in a chunk."""
    return logits.numel() if torch.compiler.is_compiling() else max(1, _CHUNK_ELEMENTS // logits.shape[-1])


def _largest_and_total(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each token [t], and the sum of exp(logit - largest) [t]; in fp32."""
    # clamp, because -inf - -inf is NaN where all columns are padding
    largest = logits.amax(-1).float().clamp(min=torch.finfo(torch.float32).min)
    return largest, (logits.float() - largest.unsqueeze(-1)).exp_().sum(-1)


def _combine(largest: Tensor, total: Tensor, own: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the ranks' results; own [t] is the label's logit, 0 on every rank except the one that has it."""
    largest_of_all = largest.clone()
    dist.all_reduce(largest_of_all, dist.ReduceOp.MAX, group=group)
    both = torch.stack([total * (largest - largest_of_all).exp(), own])
    dist.all_reduce(both, group=group)
    return largest_of_all, both[0], both[1]
