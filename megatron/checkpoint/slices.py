"""Pieces of named global tensors, in the form torch.distributed.checkpoint reads and writes.

Knows nothing of DeepSpeed. A rank holds runs of elements of its shard; a run of a row-major tensor is at most
2 * ndim - 1 boxes (the tail of a row, whole rows, the head of a row), each of them a view, so nothing is gathered.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron.engine.optimizer_state import Run
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter


def boxes(start: int, numel: int, shape: Sequence[int]) -> Iterator[tuple[list[int], list[int], int]]:
    """Cut elements [start, start + numel) of a row-major tensor into boxes: (offsets, sizes, position in the run)."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    position, end = start, start + numel
    while position < end:
        offsets = [position // stride % size for stride, size in zip(strides, shape, strict=True)]
        axis, count = _largest_box(offsets, shape, strides, end - position)
        yield offsets, [1] * axis + [count, *shape[axis + 1 :]], position - start
        position += count * strides[axis]


def _largest_box(offsets: Sequence[int], shape: Sequence[int], strides: Sequence[int], left: int) -> tuple[int, int]:
    """The outermost axis along which whole slices fit from `offsets` on, and how many of them."""
    for axis in range(len(shape)):
        count = min(left // strides[axis], shape[axis] - offsets[axis])
        if count and not any(offsets[axis + 1 :]):
            return axis, count
    raise AssertionError("the last axis has stride 1, so a box of one element always fits")


class Slices:
    """One named global tensor, of which this rank holds some boxes: a "checkpointable" of torch's protocol."""

    def __init__(self, global_shape: Sequence[int]) -> None:
        self._size = torch.Size(global_shape)
        self.parts: dict[torch.Size, Tensor] = {}

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self._size

    def add(self, run: Run, tensor: Tensor, origin: Sequence[int]) -> None:
        """Add the boxes of `run`, whose elements are `tensor` [numel], in a shard that begins at `origin`.

        What reaches beyond the global shape is padding of the vocabulary and is left out.
        """
        for offsets, sizes, at in boxes(run.start, run.numel, run.shape):
            place = [offset + base for offset, base in zip(offsets, origin, strict=True)]
            keep = [max(0, min(n, end - begin)) for n, end, begin in zip(sizes, self._size, place, strict=True)]
            if math.prod(keep):
                box = tensor.narrow(0, at, math.prod(sizes)).view(sizes)
                self.parts[torch.Size(place)] = box[tuple(slice(0, size) for size in keep)]

    def copied_to_host(self) -> "Slices":
        """A copy in host memory that later changes of the state do not touch; box by box, not whole buffers."""
        copy = Slices(self._size)
        copy.parts = {offset: part.detach().to("cpu", copy=True) for offset, part in self.parts.items()}
        return copy

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, part.size()) for offset, part in self.parts.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, part.size()),
                    properties=TensorProperties(dtype=part.dtype),
                    size=self._size,
                ),
            )
            for offset, part in self.parts.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.parts[torch.Size(index.offset or ())]


def global_slices(
    runs: Sequence[Run], grid: ParallelGrid, *, owned_only: bool, replicated_over_data: bool
) -> dict[str, Slices]:
    """The state of this rank as `{parameter name}/{kind}` -> pieces.

    owned_only: for saving, keep each element on the one rank that owns it: copies over tensor-parallel ranks belong
    to rank 0, copies over data-parallel ranks to replica 0, tied copies to the first stage.
    """
    slices: dict[str, Slices] = {}
    for run in runs:
        parameter = cast(PlacedParameter, run.parameter)
        if owned_only and not _owns(parameter, grid, replicated_over_data):
            continue
        origin = [0] * len(run.shape)
        if parameter.shard_dim is not None:
            origin[parameter.shard_dim] = parameter.shard_start
        for kind, tensor in run.tensors.items():
            name = f"{parameter.global_name}/{kind}"
            slices.setdefault(name, Slices(parameter.global_shape)).add(run, tensor, origin)
    return {name: piece for name, piece in slices.items() if piece.parts}


def _owns(parameter: PlacedParameter, grid: ParallelGrid, replicated_over_data: bool) -> bool:
    if getattr(parameter, "ds_pipe_replicated", False) or (replicated_over_data and grid.rank("replica")):
        return False
    return parameter.shard_dim is not None or grid.rank("tensor") == 0


def _part(planner: DefaultSavePlanner | DefaultLoadPlanner, index: MetadataIndex) -> Any:
    return planner.state_dict[index.fqn].__get_tensor_shard__(index)


class SavePlanner(DefaultSavePlanner):
    """Torch's planner, for a state that consists of `Slices` only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    lookup_object = _part

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """On the first rank: put the plans of all ranks together. Raises ValueError unless each element is in one.

        torch's own check compares nearly all pieces of a tensor with each other, which takes minutes for ZeRO 3 over
        a thousand ranks; and it passes over an element that two ranks hold in equal pieces.
        """
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        for name, entry in self.metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and not tiles(entry.size, entry.chunks):
                raise ValueError(f"the pieces that the ranks hold of {name} are not the whole of it, each element once")
        return self.global_plan, self.metadata


def tiles(shape: Sequence[int], boxes: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether `boxes`, which lie within `shape`, cover each element of it once.

    They do if they are as large together and no two overlap. A sweep along the axis with the most beginnings has few
    boxes open at once.
    """
    if sum(math.prod(box.sizes) for box in boxes) != math.prod(shape):
        return False
    if not shape:  # a number: one box is all of it
        return True
    axis = max(range(len(shape)), key=lambda each: len({box.offsets[each] for box in boxes}))
    active: list[ChunkStorageMetadata] = []
    for box in sorted(boxes, key=lambda box: box.offsets[axis]):
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > box.offsets[axis]]
        if any(_overlap(box, other) for other in active):
            return False
        active.append(box)
    return True


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    ranges = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in ranges)


class LoadPlanner(DefaultLoadPlanner):
    """Torch's planner, for a state that consists of `Slices` only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    lookup_tensor = _part

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Keep our objects: the default replaces every type it does not know by None."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator
