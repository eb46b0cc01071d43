"""Random streams for dropout and noise under tensor parallelism.

Replicated activations need the same mask on every rank of a tensor-parallel group: they use torch's default generators,
which the engine seeds identically within the group. Sharded activations need different masks: each rank has a stream
derived from the default CPU generator. Recomputation (`torch.utils.checkpoint`) restores the default generators, so it
repeats both kinds of masks.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.parallel.grid import ParallelGrid


@contextmanager
def own_stream(grid: ParallelGrid) -> Iterator[None]:
    """Draw random numbers that differ between the ranks of the tensor-parallel group."""
    with _stream_of(grid.rank("tensor"), grid.size("tensor"), grid.device):
        yield


@contextmanager
def _stream_of(rank: int, ranks: int, device: torch.device) -> Iterator[None]:
    seeds = torch.randint(2**63 - 1, (ranks,))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seeds[rank]))
        yield


def dropout(hidden: Tensor, probability: float, training: bool, grid: ParallelGrid) -> Tensor:
    """Dropout of hidden states: the same mask on all tensor-parallel ranks, or one each with sequence parallelism."""
    if not (training and probability):
        return hidden
    if not grid.sequence_parallel:
        return F.dropout(hidden, probability)
    if torch.compiler.is_compiling():
        dropped: Tensor
        dropped, _ = _own_dropout(hidden, probability, grid.rank("tensor"), grid.size("tensor"))
        return dropped
    with own_stream(grid):
        return F.dropout(hidden, probability)


def with_noise(hidden: Tensor, bound: float, grid: ParallelGrid) -> Tensor:
    """Hidden states plus uniform noise in [-bound, bound].

    The same noise on all tensor-parallel ranks, or one each with sequence parallelism.
    """
    with own_stream(grid) if grid.sequence_parallel else nullcontext():
        return hidden + torch.empty_like(hidden).uniform_(-bound, bound)


@torch.library.custom_op("deepy::own_dropout", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _own_dropout(hidden: Tensor, probability: float, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Dropout from the stream of `own_stream`, and its mask, as one operation of a compiled graph."""
    with _stream_of(rank, ranks, hidden.device):
        return torch.native_dropout(hidden, probability, True)


@_own_dropout.register_fake
def _(hidden: Tensor, probability: float, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden, dtype=torch.bool)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.probability = inputs[1]
    ctx.save_for_backward(output[1])


def _own_dropout_backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    (mask,) = ctx.saved_tensors
    return gradient * mask / (1 - ctx.probability), None, None, None


_own_dropout.register_autograd(_own_dropout_backward, setup_context=_keep_mask)
