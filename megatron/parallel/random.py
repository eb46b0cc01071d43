"""The random stream of one tensor-parallel rank, for dropout of activations that are cut over the group.

Activations that every rank of a tensor-parallel group has alike need the same mask on all of them: they take torch's
default generators, which whoever runs a step sets alike within the group. A rank's own stream grows out of the
default CPU generator too, and leaves them where a short draw would: `torch.utils.checkpoint`, which
restores them, repeats every mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.parallel.grid import ParallelGrid


@contextmanager
def own_stream(grid: ParallelGrid) -> Iterator[None]:
    """Draw other random numbers than the other ranks of the tensor-parallel group."""
    seeds = torch.randint(2**63 - 1, (grid.size("tensor"),))
    device = grid.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seeds[grid.rank("tensor")]))
        yield


def dropout(hidden: Tensor, probability: float, training: bool, grid: ParallelGrid) -> Tensor:
    """Dropout of hidden states: one mask for all tensor-parallel ranks, or each its own for its part of a sequence."""
    if not (training and probability):
        return hidden
    if not grid.sequence_parallel:
        return F.dropout(hidden, probability)
    with own_stream(grid):
        return F.dropout(hidden, probability)
