"""Random streams for dropout under tensor parallelism.

Replicated activations need the same mask on every rank of a tensor-parallel group: they use torch's default generators,
which the engine seeds identically within the group. Sharded activations need different masks: each rank has a stream
derived from the default CPU generator. Recomputation (`torch.utils.checkpoint`) restores the default generators, so it
repeats both kinds of masks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.parallel.grid import ParallelGrid


@contextmanager
def own_stream(grid: ParallelGrid) -> Iterator[None]:
    """Draw random numbers that differ between the ranks of the tensor-parallel group."""
    seeds = torch.randint(2**63 - 1, (grid.size("tensor"),))
    device = grid.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(seeds[grid.rank("tensor")]))
        yield


def dropout(hidden: Tensor, probability: float, training: bool, grid: ParallelGrid) -> Tensor:
    """Dropout of hidden states: the same mask on all tensor-parallel ranks, or one each with sequence parallelism."""
    if not (training and probability):
        return hidden
    if not grid.sequence_parallel:
        return F.dropout(hidden, probability)
    with own_stream(grid):
        return F.dropout(hidden, probability)
