"""A rank's own random stream: unlike the others', repeatable under recomputation, and without a trace behind it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron.parallel.random import own_stream
from tests.ranks.run import make_grid, run_ranks


def gathered(tensor: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def streams_body() -> None:
    grid = make_grid(tensor=dist.get_world_size())
    torch.manual_seed(7)
    shared = torch.rand(100, device=grid.device)
    with own_stream(grid):
        own = torch.rand(100, device=grid.device)
    with own_stream(grid):
        next_own = torch.rand(100, device=grid.device)
    after = torch.rand(100, device=grid.device)
    first, second = gathered(shared)
    assert torch.equal(first, second)
    first, second = gathered(own)
    assert not torch.equal(first, second)
    assert not torch.equal(own, next_own)
    first, second = gathered(after)
    assert torch.equal(first, second), "an own stream must leave the shared generator alike on all ranks"


def test_an_own_stream_differs_by_rank_and_leaves_the_shared_one_alike():
    run_ranks(2, streams_body)


def recompute_body() -> None:
    grid = make_grid(tensor=dist.get_world_size())

    def layer(x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x.sin(), 0.5)
        with own_stream(grid):
            return F.dropout(x.exp(), 0.5)

    gradients = []
    for recompute in (False, True):
        torch.manual_seed(7)
        x = torch.arange(64.0, device=grid.device).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        torch.rand(5, device=grid.device)  # the generator moves on between forward and backward
        y.sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_recomputation_repeats_the_masks():
    run_ranks(2, recompute_body)
