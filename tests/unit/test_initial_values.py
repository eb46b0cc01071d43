"""Cells of initial values: any part of a tensor is drawn as the whole is, and the whole is as random as one draw."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from megatron.parallel import initial_values
from megatron.parallel.initial_values import Independent, draw
from megatron.seeds import cell_seed


def fill(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


def placed(shape, dim=None, start=0, size=None, name="part", seed=1, initialise=None) -> nn.Parameter:
    """The slice of `size` rows or columns, from `start` on, of a parameter of `shape`."""
    shard = [size if axis == dim else n for axis, n in enumerate(shape)]
    parameter = nn.Parameter(torch.zeros(shard))
    vars(parameter).update(global_name=name, global_shape=tuple(shape), shard_shape=tuple(shard), shard_dim=dim)
    vars(parameter).update(shard_start=start, seed=seed, initialise=initialise or Independent(fill))
    return parameter


def values(parameter: nn.Parameter, start: int = 0, numel: int | None = None) -> Tensor:
    """What is drawn for `numel` elements of the shard, all by default."""
    elements = torch.zeros(parameter.numel() - start if numel is None else numel)
    draw([(parameter, start, elements)])
    return elements


@pytest.fixture
def small_cells(monkeypatch):
    monkeypatch.setattr(initial_values, "CELL_ELEMENTS", 12)
    monkeypatch.setattr(initial_values, "CELL_COLUMNS", 3)


@st.composite
def parts(draw_from):
    """A tensor, a slice of it that may reach into padding, and a run of elements of the slice."""
    shape = draw_from(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    dim = draw_from(st.integers(0, len(shape) - 1))
    start = draw_from(st.integers(0, shape[dim]))
    size = draw_from(st.integers(1, shape[dim] + 2 - start))
    numel = math.prod(size if axis == dim else n for axis, n in enumerate(shape))
    first = draw_from(st.integers(0, numel - 1))
    return shape, dim, start, size, first, draw_from(st.integers(1, numel - first))


@given(parts())
def test_any_run_of_elements_of_any_slice_is_drawn_as_in_the_whole(part):
    shape, dim, start, size, first, numel = part
    with patch.multiple(initial_values, CELL_ELEMENTS=12, CELL_COLUMNS=3):
        whole = values(placed(shape, dim, 0, shape[dim])).view(shape)
        found = values(placed(shape, dim, start, size), first, numel)
    padded = torch.cat([whole, torch.zeros([2 if axis == dim else n for axis, n in enumerate(shape)])], dim)
    assert torch.equal(found, padded.narrow(dim, start, size).flatten()[first : first + numel])


def test_names_seeds_and_cells_have_streams_of_their_own(small_cells):
    ways = [placed((40, 7)), placed((40, 7), name="other"), placed((40, 7), seed=2)]
    assert torch.stack([values(way) for way in ways]).unique().numel() == 3 * 280


def test_the_cells_of_a_tensor_have_different_seeds():
    """Torch uses 32 bits of a seed: at random, two of 100,000 cells would share one in two tensors of three."""
    seeds = {cell_seed("1/part", number) for number in range(100_000)}
    assert len(seeds) == 100_000 and max(seeds) < 2**32


@pytest.mark.parametrize("dim", [None, 1])
def test_the_whole_is_as_random_as_one_draw(dim):
    """All moments are standard normal over seeds: 5 is exceeded once in a million times; the seed is fixed."""
    n = 1024
    drawn = values(placed((n, n), dim, 0, n)).double()
    moments = {
        "mean": drawn.mean() * n,
        "variance": (drawn.var() - 1) * n / math.sqrt(2),
        "skewness": drawn.pow(3).mean() * n / math.sqrt(15),
        "kurtosis": (drawn.pow(4).mean() - 3) * n / math.sqrt(96),
    }
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        quantile = math.sqrt(2) * torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.double))
        moments[f"below {quantile:.2f}"] = (
            ((drawn < quantile).sum() / n**2 - share) * n / math.sqrt(share * (1 - share))
        )
    table = drawn.view(n, n)
    cells = table.view(2, 512, 2, 512).transpose(1, 2).reshape(4, -1) if dim == 1 else drawn.view(4, -1)
    moments |= {f"cells {i} and {j}": (cells[i] * cells[j]).mean() * 512 for i in range(4) for j in range(i)}
    moments["neighbours"] = (drawn[:-1] * drawn[1:]).mean() * n
    assert max(map(abs, moments.values())) < 5, moments
    # the largest singular value of a random matrix: 2 sqrt(n), off by about n^(-2/3) of it; equal rows double it
    assert torch.linalg.matrix_norm(table, 2) == pytest.approx(2 * math.sqrt(n), rel=0.03)


def test_an_initialiser_that_is_not_independent_gets_the_whole_tensor(small_cells):
    def orthogonal(tensor: Tensor, generator: torch.Generator) -> None:
        assert tensor.shape == (8, 8)
        nn.init.orthogonal_(tensor, generator=generator)

    whole = values(placed((8, 8), 0, 0, 8, initialise=orthogonal)).view(8, 8)
    torch.testing.assert_close(whole @ whole.t(), torch.eye(8))
    assert torch.equal(values(placed((8, 8), 0, 4, 4, initialise=orthogonal), 8, 16), whole[5:7].flatten())


def test_a_factor_is_that_of_the_whole_tensor_in_each_of_its_parts(small_cells):
    scaled = Independent(fill, lambda shape: shape[0] + 10 * shape[1])
    plain, whole = (values(placed((40, 7), 1, 0, 7, initialise=i)).view(40, 7) for i in (None, scaled))
    assert torch.equal(whole, 110 * plain)
    assert torch.equal(values(placed((40, 7), 1, 2, 3, initialise=scaled), 9, 60), whole[3:23, 2:5].flatten())


def test_values_are_rounded_to_the_type_of_their_place():
    parameter = placed((20, 30))
    elements = torch.zeros(600, dtype=torch.bfloat16)
    draw([(parameter, 0, elements)])
    assert torch.equal(elements, values(parameter).bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_on_a_gpu_are_those_on_a_cpu(dtype):
    parameter = placed((1500, 1100), 1, 200, 500)
    elements = torch.zeros(parameter.numel(), dtype=dtype, device="cuda")
    draw([(parameter, 0, elements)])
    assert torch.equal(elements.cpu(), values(parameter).to(dtype))


def test_threads_change_no_value_and_torch_keeps_its_own(small_cells):
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            drawn.append(values(placed((64, 64), 1, 0, 64)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_an_initialiser_that_fails_says_so():
    def broken(tensor: Tensor, generator: torch.Generator) -> None:
        raise ArithmeticError("no values")

    threads = torch.get_num_threads()
    with pytest.raises(ArithmeticError, match="no values"):
        values(placed((3,), initialise=broken))
    assert torch.get_num_threads() == threads
