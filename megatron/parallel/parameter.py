"""Parameters with a global name and shape, whose initial values do not depend on the layout.

A shard is one contiguous slice of the whole tensor along one dimension. Each whole tensor is drawn from a separate
random stream, seeded by the run's seed and the parameter's global name; every rank draws it and keeps its slice.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from megatron.parallel.grid import ParallelGrid
from megatron.seeds import generator_seed

Initialiser = Callable[[Tensor, torch.Generator], object]  # fills a whole fp32 tensor on the CPU, in place


class PlacedParameter(nn.Parameter):
    """The attributes that `new_parameter` sets.

    Only a type for `cast`, without instances: DeepSpeed and torch.compile handle plain parameters best.
    """

    global_name: str  # the same in every layout; set by `name_and_initialise`
    global_shape: tuple[int, ...]  # of the whole tensor, without vocabulary padding
    shard_dim: int | None  # the dimension sharded over the tensor-parallel ranks; None: replicated
    shard_start: int  # offset of this rank's slice along shard_dim
    initialise: Initialiser
    model_parallel: bool  # whether it is sharded; DeepSpeed's gradient norm reads it


def new_parameter(
    global_shape: tuple[int, ...],
    shard_dim: int | None,
    initialise: Initialiser,
    grid: ParallelGrid,
    padded_size: int | None = None,
) -> nn.Parameter:
    """This rank's slice of a parameter, uninitialised until `name_and_initialise` fills it.

    padded_size: size of shard_dim in memory if larger than in global_shape; the rows beyond are zero.
    Raises ValueError if the tensor-parallel size does not divide the dimension.
    """
    local_shape, start = list(global_shape), 0
    if shard_dim is not None:
        size, ranks = padded_size or global_shape[shard_dim], grid.size("tensor")
        if size % ranks:
            raise ValueError(f"dimension {shard_dim} of {global_shape}: {size} is not divisible by {ranks}")
        local_shape[shard_dim] = size // ranks
        start = grid.rank("tensor") * local_shape[shard_dim]
    parameter = nn.Parameter(torch.empty(local_shape, device=grid.device))
    vars(parameter).update(
        global_name="",
        global_shape=global_shape,
        shard_dim=shard_dim,
        shard_start=start,
        initialise=initialise,
        model_parallel=shard_dim is not None and grid.size("tensor") > 1,
    )
    return parameter


def name_and_initialise(module: nn.Module, prefix: str, seed: int) -> None:
    """Set the global name, "prefix.local_name", and the initial values of every parameter of `module`."""
    for local_name, parameter in module.named_parameters():
        placed = cast(PlacedParameter, parameter)
        placed.global_name = f"{prefix}.{local_name}" if prefix else local_name
        whole = torch.empty(placed.global_shape, dtype=torch.float32)
        placed.initialise(whole, torch.Generator().manual_seed(generator_seed(f"{seed}/{placed.global_name}")))
        load_whole(parameter, whole)


def load_state(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Fill every parameter of `module` with its slice of the whole tensor of its global name.

    Raises ValueError if a name is missing in `whole` or a shape differs.
    """
    for parameter in module.parameters():
        name = cast(PlacedParameter, parameter).global_name
        if name not in whole:
            raise ValueError(f"{name} is missing among {len(whole)} tensors")
        load_whole(parameter, whole[name])


@torch.no_grad()
def load_whole(parameter: nn.Parameter, whole: Tensor) -> None:
    """Fill `parameter` with its slice of the `whole` tensor, of shape `global_shape`; padding becomes zero."""
    placed = cast(PlacedParameter, parameter)
    if tuple(whole.shape) != placed.global_shape:
        raise ValueError(f"{placed.global_name} is {placed.global_shape}, not {tuple(whole.shape)}")
    if placed.shard_dim is None:
        parameter.copy_(whole)
        return
    length = parameter.shape[placed.shard_dim]
    start = min(placed.shard_start, whole.shape[placed.shard_dim])
    mine = whole[(slice(None),) * placed.shard_dim + (slice(start, start + length),)]
    parameter.zero_()
    parameter.narrow(placed.shard_dim, 0, mine.shape[placed.shard_dim]).copy_(mine)
