"""Each tensor-parallel primitive against its unsharded form, forward and backward, on 1, 2 and 4 ranks.

Tolerances are torch.testing's for fp32 (1.3e-6 relative, 1e-5 absolute): a sum over ranks only changes the order of a
few dozen additions of numbers of order one.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from megatron.parallel import collectives
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    row_parallel_sum,
    zeros,
)
from megatron.parallel.parameter import load_whole
from tests.ranks.run import make_grid, own_device, run_ranks

TP = pytest.mark.parametrize("tp", [1, 2, 4])


def all_ranks() -> ParallelGrid:
    return make_grid(tensor=dist.get_world_size())


def part(whole: Tensor, dim: int, grid: ParallelGrid) -> Tensor:
    return whole.chunk(grid.size("tensor"), dim)[grid.rank("tensor")]


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).to(own_device()).requires_grad_()


def copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def collectives_body() -> None:
    grid = all_ranks()
    group, rank, ranks = grid.group("tensor"), grid.rank("tensor"), grid.size("tensor")
    whole = leaf(3, 4 * ranks)

    copied = copy_of(whole)
    (collectives.copy_to_group(copied, group) * (rank + 1)).sum().backward()
    assert_close(copied.grad, torch.full_like(whole, sum(range(1, ranks + 1))))

    reduced = copy_of(whole)
    result = collectives.reduce_from_group(reduced * (rank + 1), group)
    assert_close(result, whole * sum(range(1, ranks + 1)))
    result.square().sum().backward()
    assert_close(reduced.grad, 2 * result.detach() * (rank + 1))

    mine = copy_of(part(whole, -1, grid))
    gathered = collectives.gather_from_group(mine, group)
    assert_close(gathered, whole)
    (gathered**3).sum().backward()
    assert_close(mine.grad, part(3 * whole.detach() ** 2, -1, grid))


@TP
def test_collectives_are_right_forward_and_backward(tp):
    run_ranks(tp, collectives_body)


def load_linear(layer: nn.Module, full: nn.Linear) -> None:
    load_whole(layer.weight, full.weight)
    if full.bias is not None:
        load_whole(layer.bias, full.bias)


def column_body(bias: bool) -> None:
    grid = all_ranks()
    full, layer = nn.Linear(8, 12, bias=bias).to(grid.device), ColumnParallelLinear(8, 12, bias, zeros, grid)
    load_linear(layer, full)
    inputs = leaf(5, 3, 8)
    mine, theirs = copy_of(inputs), copy_of(inputs)
    out, expected = layer(mine), full(theirs)
    assert_close(out, part(expected, -1, grid))
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_close(mine.grad, theirs.grad)
    assert_close(layer.weight.grad, part(full.weight.grad, 0, grid))
    if bias:
        assert_close(layer.bias.grad, part(full.bias.grad, 0, grid))


@TP
@pytest.mark.parametrize("bias", [True, False])
def test_column_parallel_linear_equals_a_plain_linear(tp, bias):
    run_ranks(tp, column_body, bias)


def row_body(bias: bool) -> None:
    grid = all_ranks()
    full, layer = nn.Linear(8, 12, bias=bias).to(grid.device), RowParallelLinear(8, 12, bias, zeros, grid)
    load_linear(layer, full)
    inputs = leaf(5, 3, 8)
    mine, theirs = copy_of(part(inputs, -1, grid)), copy_of(inputs)
    out, expected = layer(mine), full(theirs)
    assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_close(mine.grad, part(theirs.grad, -1, grid))
    assert_close(layer.weight.grad, part(full.weight.grad, 1, grid))
    if bias:
        assert_close(layer.bias.grad, full.bias.grad)


@TP
@pytest.mark.parametrize("bias", [True, False])
def test_row_parallel_linear_equals_a_plain_linear(tp, bias):
    run_ranks(tp, row_body, bias)


def row_sum_body(biases: tuple[bool, bool]) -> None:
    grid = all_ranks()
    widths = (8, 16)
    fulls = [nn.Linear(width, 12, bias=bias).to(grid.device) for width, bias in zip(widths, biases, strict=True)]
    layers = [RowParallelLinear(width, 12, bias, zeros, grid) for width, bias in zip(widths, biases, strict=True)]
    for layer, full in zip(layers, fulls, strict=True):
        load_linear(layer, full)
    inputs = [torch.randn(5, 3, width).to(grid.device) for width in widths]
    out = row_parallel_sum(*((layer, part(x, -1, grid)) for layer, x in zip(layers, inputs, strict=True)))
    expected = sum(full(x) for full, x in zip(fulls, inputs, strict=True))
    assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for layer, full in zip(layers, fulls, strict=True):
        assert_close(layer.weight.grad, part(full.weight.grad, 1, grid))
        if full.bias is not None:
            assert_close(layer.bias.grad, full.bias.grad)


@TP
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_a_sum_of_row_parallel_layers_keeps_every_branch_and_every_bias(tp, biases):
    run_ranks(tp, row_sum_body, biases)


def embedding_body(vocab_size: int, padded_size: int) -> None:
    grid = all_ranks()
    full = nn.Embedding(vocab_size, 6).to(grid.device)
    table = VocabParallelEmbedding(vocab_size, padded_size, 6, zeros, grid)
    load_whole(table.weight, full.weight)
    tokens = torch.randint(0, vocab_size, (3, 11)).to(grid.device)
    tokens[0, :2] = torch.tensor([0, vocab_size - 1], device=grid.device)
    table(tokens).square().sum().backward()
    full(tokens).square().sum().backward()
    assert_close(table(tokens), full(tokens))
    padded = F.pad(full.weight.grad, (0, 0, 0, padded_size - vocab_size))
    assert_close(table.weight.grad, part(padded, 0, grid))


@TP
@pytest.mark.parametrize("sizes", [(61, 64), (64, 64), (5, 128)])
def test_vocab_parallel_embedding_equals_a_plain_embedding(tp, sizes):
    run_ranks(tp, embedding_body, *sizes)


def logits_body(vocab_size: int, padded_size: int) -> None:
    grid = all_ranks()
    full = nn.Linear(6, vocab_size, bias=False).to(grid.device)
    table = VocabParallelEmbedding(vocab_size, padded_size, 6, zeros, grid)
    load_whole(table.weight, full.weight)
    hidden = leaf(3, 5, 6)
    mine, theirs = copy_of(hidden), copy_of(hidden)
    out = table.logits(mine)
    expected = F.pad(full(theirs), (0, padded_size - vocab_size), value=float("-inf"))
    assert_close(out, part(expected, -1, grid))
    finite = out.isfinite()
    out.masked_fill(~finite, 0).square().sum().backward()
    full(theirs).square().sum().backward()
    assert_close(mine.grad, theirs.grad)
    assert_close(table.weight.grad, part(F.pad(full.weight.grad, (0, 0, 0, padded_size - vocab_size)), 0, grid))


@TP
@pytest.mark.parametrize("sizes", [(61, 64), (64, 64), (5, 128)])
def test_logits_of_the_vocabulary_equal_a_plain_head_and_are_minus_infinity_in_the_padding(tp, sizes):
    run_ranks(tp, logits_body, *sizes)
