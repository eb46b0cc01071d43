"""Parameters with a global name and shape, of which each rank holds one contiguous slice along one dimension."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from megatron.parallel.grid import ParallelGrid

Initialiser = Callable[[Tensor, torch.Generator], object]  # fills a whole fp32 tensor on the CPU, in place


class PlacedParameter(nn.Parameter):
    """The attributes that `new_parameter` sets.

    Only a type for `cast`, without instances: DeepSpeed and torch.compile handle plain parameters best.
    """

    global_name: str  # the same in every layout; set by `name_parameters`
    global_shape: tuple[int, ...]  # of the whole tensor, without vocabulary padding
    shard_shape: tuple[int, ...]  # of this rank's slice; under ZeRO 3 the parameter itself is empty
    shard_dim: int | None  # the dimension sharded over the tensor-parallel ranks; None: replicated
    shard_start: int  # offset of this rank's slice along shard_dim
    initialise: Initialiser
    seed: int | None  # of the initial values; None: they are loaded; set by `name_parameters`
    model_parallel: bool  # whether it is sharded; DeepSpeed's gradient norm reads it


def new_parameter(
    global_shape: tuple[int, ...],
    shard_dim: int | None,
    initialise: Initialiser,
    grid: ParallelGrid,
    padded_size: int | None = None,
) -> nn.Parameter:
    """This rank's slice of a parameter, zero until `initial_values.py` draws it or a checkpoint is loaded.

    padded_size: size of shard_dim in memory if larger than in global_shape; the rows beyond stay zero.
    Raises ValueError if the tensor-parallel size does not divide the dimension.
    """
    local_shape, start = list(global_shape), 0
    if shard_dim is not None:
        size, ranks = padded_size or global_shape[shard_dim], grid.size("tensor")
        if size % ranks:
            raise ValueError(f"dimension {shard_dim} of {global_shape}: {size} is not divisible by {ranks}")
        local_shape[shard_dim] = size // ranks
        start = grid.rank("tensor") * local_shape[shard_dim]
    parameter = nn.Parameter(torch.zeros(local_shape, device=grid.device))
    vars(parameter).update(
        global_name="",
        global_shape=global_shape,
        shard_shape=tuple(local_shape),
        shard_dim=shard_dim,
        shard_start=start,
        initialise=initialise,
        seed=None,
        model_parallel=shard_dim is not None and grid.size("tensor") > 1,
    )
    return parameter


def name_parameters(module: nn.Module, prefix: str, seed: int | None) -> None:
    """Set the global name, "prefix.local_name", of every parameter of `module`, and the seed of its initial values."""
    for local_name, parameter in module.named_parameters():
        placed = cast(PlacedParameter, parameter)
        placed.global_name = f"{prefix}.{local_name}" if prefix else local_name
        placed.seed = seed


def load_state(module: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Fill every parameter of `module` with its slice of the whole tensor of its global name.

    Raises ValueError if a name is missing in `whole` or a shape differs.
    """
    for parameter in module.parameters():
        name = cast(PlacedParameter, parameter).global_name
        if name not in whole:
            raise ValueError(f"{name} is missing among {len(whole)} tensors")
        load_whole(parameter, whole[name])


def load_whole(parameter: nn.Parameter, whole: Tensor) -> None:
    """Fill `parameter` with its slice of the `whole` tensor, of shape `global_shape`; padding is left as it is."""
    placed = cast(PlacedParameter, parameter)
    if tuple(whole.shape) != placed.global_shape:
        raise ValueError(f"{placed.global_name} is {placed.global_shape}, not {tuple(whole.shape)}")
    for offsets, chunk in global_chunks(parameter, 0, parameter.detach().view(-1)):
        chunk.copy_(whole[tuple(slice(at, at + size) for at, size in zip(offsets, chunk.shape, strict=True))])


def global_chunks(parameter: nn.Parameter, start: int, elements: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The chunks of the whole tensor that a fragment of `parameter` consists of: (offsets, view of `elements`).

    A fragment is consecutive elements of this rank's shard, flattened: `elements` [n], from `start` on. A chunk is a
    rectangular block of the whole tensor. What exceeds the global shape is padding of the vocabulary and is left out.
    """
    placed = cast(PlacedParameter, parameter)
    for in_shard, sizes, at in chunks_of_fragment(start, elements.numel(), placed.shard_shape):
        offsets = tuple(
            offset + (placed.shard_start if axis == placed.shard_dim else 0) for axis, offset in enumerate(in_shard)
        )
        kept = [max(0, min(n, end - begin)) for n, end, begin in zip(sizes, placed.global_shape, offsets, strict=True)]
        if math.prod(kept):
            chunk = elements.narrow(0, at, math.prod(sizes)).view(sizes)
            yield offsets, chunk[tuple(slice(0, size) for size in kept)]


def chunks_of_fragment(start: int, numel: int, shape: Sequence[int]) -> Iterator[tuple[list[int], list[int], int]]:
    """Cut elements [start, start + numel) of a row-major tensor into chunks: (offsets, sizes, first element).

    They are at most 2 * ndim - 1: the tail of a row, whole rows, the head of a row.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    position, end = start, start + numel
    while position < end:
        offsets = [position // stride % size for stride, size in zip(strides, shape, strict=True)]
        axis, count = _largest_chunk(offsets, shape, strides, end - position)
        yield offsets, [1] * axis + [count, *shape[axis + 1 :]], position - start
        position += count * strides[axis]


def _largest_chunk(offsets: Sequence[int], shape: Sequence[int], strides: Sequence[int], left: int) -> tuple[int, int]:
    """The outermost axis along which the chunk at `offsets` can extend within `left` elements, and its length there."""
    for axis in range(len(shape)):
        count = min(left // strides[axis], shape[axis] - offsets[axis])
        if count and not any(offsets[axis + 1 :]):
            return axis, count
    raise AssertionError("the last axis has stride 1, so a chunk of one element always fits")
