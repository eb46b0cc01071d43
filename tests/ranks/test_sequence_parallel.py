"""Sequences that are cut over ranks: each primitive against its unsharded form, forward and backward.

Tolerances are torch.testing's for fp32 (1.3e-6 relative, 1e-5 absolute): a sum over ranks only changes the order of a
few dozen additions of numbers of order one.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from megatron.model.norms import LayerNorm, RMSNorm
from megatron.parallel import collectives
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    column_parallel,
    row_parallel_sum,
    zeros,
)
from megatron.parallel.parameter import load_whole
from megatron.parallel.random import dropout
from tests.models import small
from tests.ranks.run import make_grid, own_device, run_ranks

RANKS = pytest.mark.parametrize("ranks", [2, 4])


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).to(own_device()).requires_grad_()


def copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def part(whole: Tensor, dim: int) -> Tensor:
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def collectives_body() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    whole = leaf(3, 4 * ranks, 5)

    mine = copy_of(part(whole, 1))
    gathered = collectives.gather_sequence(mine, group)
    assert_close(gathered, whole)
    (gathered**2 * (rank + 1)).sum().backward()
    assert_close(mine.grad, part(2 * whole.detach(), 1) * sum(range(1, ranks + 1)))

    summand = copy_of(whole)
    result = collectives.scatter_sequence(summand * (rank + 1), group)
    assert_close(result, part(whole, 1) * sum(range(1, ranks + 1)))
    result.square().sum().backward()
    everywhere = 2 * whole.detach() * sum(range(1, ranks + 1))
    assert_close(summand.grad, everywhere * (rank + 1))

    heads = leaf(3, 4 * ranks, 2 * ranks, 5)  # [b, s, n, d], of which this rank has a part of s and then a part of n
    mine = copy_of(part(heads, 1))
    swapped = collectives.exchange(mine, 2, 1, group)
    assert_close(swapped, part(heads, 2))
    back = collectives.exchange(swapped**2, 1, 2, group)
    assert_close(back, part(heads**2, 1))
    (back * part(heads, 1).detach()).sum().backward()
    assert_close(mine.grad, part(2 * heads.detach() ** 2, 1))


@RANKS
def test_collectives_over_a_sequence_are_right_forward_and_backward(ranks):
    run_ranks(ranks, collectives_body)


def check(layer: nn.Module, whole: nn.Module, inputs: Tensor, split: dict[str, int], expected: Tensor) -> None:
    """The gradients of `layer`, whose outputs have been driven backward like `expected`."""
    expected.square().sum().backward()
    for name, parameter in whole.named_parameters():
        gradient = part(parameter.grad, split[name]) if name in split else parameter.grad
        assert_close(layer.get_parameter(name).grad, gradient, msg=lambda text, n=name: f"{n}: {text}")


def load(layer: nn.Module, whole: nn.Module) -> nn.Module:
    for name, parameter in whole.named_parameters():
        load_whole(layer.get_parameter(name), parameter)
    return layer


def layers_body() -> None:
    grid = make_grid(tensor=dist.get_world_size(), sequence_parallel=True)
    whole = leaf(3, 8, 8)
    split = {"weight": 0, "bias": 0}

    first, second = nn.Linear(8, 12).to(grid.device), nn.Linear(8, 4, bias=False).to(grid.device)
    one = load(ColumnParallelLinear(8, 12, True, zeros, grid), first)
    two = load(ColumnParallelLinear(8, 4, False, zeros, grid), second)
    mine, theirs = copy_of(part(whole, 1)), copy_of(whole)
    outs = column_parallel(mine, grid, (one.weight, one.bias), (two.weight, two.bias))
    expected = [first(theirs), second(theirs)]
    for out, wanted in zip(outs, expected, strict=True):
        assert_close(out, part(wanted, -1))
    torch.cat(outs, -1).square().sum().backward()
    check(one, first, whole, split, torch.cat(expected, -1))
    assert_close(two.weight.grad, part(second.weight.grad, 0))
    assert_close(mine.grad, part(theirs.grad, 1))

    for biases in ((True, True), (True, False), (False, False)):
        fulls = [nn.Linear(width, 12, bias=bias).to(grid.device) for width, bias in zip((8, 16), biases, strict=True)]
        rows = [
            load(RowParallelLinear(full.in_features, 12, full.bias is not None, zeros, grid), full) for full in fulls
        ]
        inputs = [torch.randn(3, 8, width).to(grid.device) for width in (8, 16)]
        out = row_parallel_sum(*((row, part(x, -1)) for row, x in zip(rows, inputs, strict=True)))
        expected_sum = fulls[0](inputs[0]) + fulls[1](inputs[1])
        assert_close(out, part(expected_sum, 1))
        out.square().sum().backward()
        expected_sum.square().sum().backward()
        for row, full in zip(rows, fulls, strict=True):
            assert_close(row.weight.grad, part(full.weight.grad, 1))
            if full.bias is not None:
                assert_close(row.bias.grad, full.bias.grad)

    for own, plain in ((LayerNorm, nn.LayerNorm), (RMSNorm, partial(nn.RMSNorm))):
        norm = plain(8, eps=1e-5).to(grid.device)
        layer = load(own(small(hidden_size=8, norm_epsilon=1e-5), grid), norm)
        mine, theirs = copy_of(part(whole, 1)), copy_of(whole)
        out, wanted = layer(mine), norm(theirs)
        assert_close(out, part(wanted, 1))
        (out**3).sum().backward()
        (wanted**3).sum().backward()
        for name, parameter in norm.named_parameters():
            assert_close(layer.get_parameter(name).grad, parameter.grad)
        assert_close(mine.grad, part(theirs.grad, 1))


@RANKS
def test_layers_between_cut_sequences_equal_plain_ones(ranks):
    run_ranks(ranks, layers_body)


def ends_body() -> None:
    grid = make_grid(tensor=dist.get_world_size(), sequence_parallel=True)
    full = nn.Embedding(61, 6).to(grid.device)
    table = load(VocabParallelEmbedding(61, 64, 6, zeros, grid), full)
    tokens, hidden = torch.randint(0, 61, (3, 8)).to(grid.device), leaf(3, 8, 6)
    vectors, mine, theirs = table(tokens), copy_of(part(hidden, 1)), copy_of(hidden)
    assert_close(vectors, part(full(tokens), 1))
    logits, expected = table.logits(mine), F.pad(theirs @ full.weight.t(), (0, 3), value=float("-inf"))
    assert_close(logits, part(expected, -1))
    (vectors.square().sum() + logits.masked_fill(~logits.isfinite(), 0).square().sum()).backward()
    (full(tokens).square().sum() + (theirs @ full.weight.t()).square().sum()).backward()
    assert_close(table.weight.grad, part(F.pad(full.weight.grad, (0, 0, 0, 3)), 0))
    assert_close(mine.grad, part(theirs.grad, 1))


@RANKS
def test_both_ends_of_a_model_with_cut_sequences_equal_plain_ones(ranks):
    run_ranks(ranks, ends_body)


def masks_body(sequence_parallel: bool) -> None:
    grid = make_grid(tensor=2, sequence_parallel=sequence_parallel)
    mine = dropout(torch.ones(2, 16, 8, device=grid.device), 0.5, True, grid)
    first, second = (torch.empty_like(mine) for _ in range(2))
    dist.all_gather([first, second], mine)
    assert torch.equal(first, second) != sequence_parallel
    assert torch.equal(dropout(mine, 0.5, False, grid), mine)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parts_of_a_sequence_drop_by_masks_of_their_own_and_copies_by_the_same(sequence_parallel):
    run_ranks(2, masks_body, sequence_parallel)


def grid_body() -> None:
    grid = make_grid(tensor=2, context=2, sequence_parallel=True)
    rank = dist.get_rank()
    assert (grid.rank("context"), grid.rank("tensor"), grid.rank("replica")) == (rank // 2, rank % 2, rank // 2)
    assert grid.own_tokens(4) == slice(4 * rank, 4 * rank + 4)
    whole = make_grid(tensor=2, context=2)
    assert whole.own_tokens(8) == slice(8 * (rank // 2), 8 * (rank // 2) + 8)
    both = make_grid(context=2)
    assert (both.size("data"), both.size("context"), both.size("replica")) == (2, 2, 4)
    assert dist.get_process_group_ranks(both.group("replica")) == [0, 1, 2, 3]
    assert both.rank("replica") == 2 * both.rank("data") + both.rank("context") == rank


def test_ranks_know_their_part_of_a_sequence_and_who_has_the_same_weights():
    run_ranks(4, grid_body)
