"""Parameters are born equal in every layout, know their place, and take their slice of a whole tensor."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from megatron.parallel.grid import ParallelGrid
from megatron.parallel.initial_values import initialise
from megatron.parallel.parameter import load_whole, name_parameters, new_parameter
from tests.ranks.run import make_grid, one_rank, run_ranks


def gaussian(tensor: torch.Tensor, generator: torch.Generator) -> None:
    tensor.normal_(generator=generator)


class Mixed(nn.Module):
    """One parameter of each kind: cut along rows, along columns, whole, and padded."""

    def __init__(self, grid: ParallelGrid) -> None:
        super().__init__()
        self.rows = new_parameter((8, 6), 0, gaussian, grid)
        self.columns = new_parameter((6, 8), 1, gaussian, grid)
        self.whole = new_parameter((5,), None, gaussian, grid)
        self.padded = new_parameter((7, 3), 0, gaussian, grid, padded_size=12)


def whole_values(seed: int = 3) -> dict[str, torch.Tensor]:
    with one_rank() as grid:
        module = Mixed(grid)
        name_parameters(module, "part", seed)
        initialise(module)
        return {name: parameter.detach() for name, parameter in module.named_parameters()}


def slices_body(whole: dict[str, torch.Tensor]) -> None:
    grid = make_grid(tensor=dist.get_world_size())
    module = Mixed(grid)
    name_parameters(module, "part", seed=3)
    initialise(module)
    for name, parameter in module.named_parameters():
        dim = parameter.shard_dim
        expected = whole[name] if dim is None else whole[name].chunk(grid.size("tensor"), dim)[grid.rank("tensor")]
        assert_close(parameter.detach(), expected, rtol=0, atol=0)
        assert parameter.global_name == f"part.{name}"
        assert parameter.model_parallel == (dim is not None and grid.size("tensor") > 1)
        assert parameter.shard_start == (0 if dim is None else grid.rank("tensor") * parameter.shape[dim])
    assert module.padded.global_shape == (7, 3)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_slices_are_born_as_slices_of_the_same_whole(tp):
    run_ranks(tp, slices_body, whole_values())


def test_padding_is_zero_and_the_true_rows_do_not_depend_on_it():
    values = whole_values()
    assert values["padded"].shape == (12, 3)
    assert (values["padded"][7:] == 0).all() and (values["padded"][:7] != 0).all()


def test_first_values_depend_on_the_seed_and_on_the_name():
    values, others = whole_values(seed=3), whole_values(seed=4)
    assert not torch.equal(values["rows"], others["rows"])
    assert not torch.equal(values["rows"].flatten(), values["columns"].flatten())


def test_a_tensor_of_the_wrong_shape_is_refused():
    with one_rank() as grid:
        module = Mixed(grid)
        name_parameters(module, "part", seed=3)
        with pytest.raises(ValueError, match=r"part.rows is \(8, 6\), not \(6, 8\)"):
            load_whole(module.rows, torch.zeros(6, 8))


def uneven_body() -> None:
    grid = make_grid(tensor=2)
    with pytest.raises(ValueError, match="7 is not divisible by 2"):
        new_parameter((7, 2), 0, gaussian, grid)


def test_a_dimension_that_does_not_divide_is_refused():
    run_ranks(2, uneven_body)
