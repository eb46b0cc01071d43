"""Chunks of named global tensors, in the form that torch.distributed.checkpoint reads and writes.

A fragment is what the engine holds: consecutive elements of this rank's tensor-parallel shard, flattened. A chunk is
what torch stores: a rectangular block of a global tensor, given by offsets and sizes. A fragment consists of a few
chunks, each of them a view, so nothing is gathered.
"""

import math
from collections.abc import Callable, Sequence
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
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron.engine.deepspeed_internals import is_tied_copy
from megatron.engine.optimizer_state import Fragment
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter, global_chunks


class LocalChunks:
    """This rank's chunks of one named global tensor: a "checkpointable" of torch's protocol."""

    def __init__(self, global_shape: Sequence[int]) -> None:
        self._size = torch.Size(global_shape)
        self.chunks: dict[torch.Size, Tensor] = {}  # offsets -> elements

    def size(self) -> torch.Size:
        """Shape of the global tensor."""
        return self._size

    def like(self, tensor_for: Callable[[Tensor], Tensor]) -> "LocalChunks":
        """The same chunks in other tensors: `tensor_for(chunk)` has the shape and type of `chunk`."""
        other = LocalChunks(self._size)
        other.chunks = {offset: tensor_for(chunk) for offset, chunk in self.chunks.items()}
        return other

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, chunk.size()) for offset, chunk in self.chunks.items()]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, chunk.size()),
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=self._size,
                ),
            )
            for offset, chunk in self.chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.chunks[torch.Size(index.offset or ())]


def local_chunks(
    fragments: Sequence[Fragment], grid: ParallelGrid, *, owned_only: bool, replicated_over_data: bool
) -> dict[str, LocalChunks]:
    """The state of this rank as `{parameter name}/{kind}` -> chunks.

    owned_only: for saving, keep each element on one rank only: replicas over tensor-parallel ranks on rank 0, replicas
    over data-parallel ranks on replica 0, tied weights on the first stage.
    """
    found: dict[str, LocalChunks] = {}
    for fragment in fragments:
        parameter = cast(PlacedParameter, fragment.parameter)
        if owned_only and not _owns(parameter, grid, replicated_over_data or fragment.replicated):
            continue
        for kind, tensor in fragment.tensors.items():
            name = f"{parameter.global_name}/{kind}"
            local = found.setdefault(name, LocalChunks(parameter.global_shape))
            local.chunks |= {torch.Size(at): chunk for at, chunk in global_chunks(parameter, fragment.start, tensor)}
    return {name: local for name, local in found.items() if local.chunks}


def _owns(parameter: PlacedParameter, grid: ParallelGrid, replicated_over_data: bool) -> bool:
    if is_tied_copy(parameter) or (replicated_over_data and grid.rank("replica")):
        return False
    return parameter.shard_dim is not None or grid.rank("tensor") == 0


def _chunk(planner: DefaultSavePlanner | DefaultLoadPlanner, index: MetadataIndex) -> Any:
    return planner.state_dict[index.fqn].__get_tensor_shard__(index)


class SavePlanner(DefaultSavePlanner):
    """torch's planner, for a state of `LocalChunks` only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    lookup_object = _chunk

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Merge the plans of all ranks, on rank 0. Raises ValueError unless each element is in exactly one of them.

        torch's own check compares nearly all chunks of a tensor pairwise, which takes minutes for ZeRO 3 over a
        thousand ranks; and it misses an element that two ranks hold in equal chunks.
        """
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        for name, entry in self.metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and not tiles(entry.size, entry.chunks):
                raise ValueError(f"the chunks of {name} on all ranks do not cover each of its elements once")
        return self.global_plan, self.metadata


def tiles(shape: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether `chunks`, all within `shape`, cover each element of it exactly once.

    They do if their sizes add up and no two overlap. Overlaps are searched by a sweep along the axis with the most
    distinct offsets, so that few chunks are compared at a time.
    """
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        return False
    if not shape:  # a scalar: one chunk is all of it
        return True
    axis = max(range(len(shape)), key=lambda each: len({chunk.offsets[each] for chunk in chunks}))
    active: list[ChunkStorageMetadata] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[axis]):
        active = [other for other in active if other.offsets[axis] + other.sizes[axis] > chunk.offsets[axis]]
        if any(_overlap(chunk, other) for other in active):
            return False
        active.append(chunk)
    return True


def _overlap(one: ChunkStorageMetadata, other: ChunkStorageMetadata) -> bool:
    ranges = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in ranges)


class LoadPlanner(DefaultLoadPlanner):
    """torch's planner, for a state of `LocalChunks` only."""

    def __init__(self, loaded: Callable[[int], object] = lambda count: None) -> None:
        """loaded: is called with the bytes of each piece that has been read."""
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._loaded = loaded

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Count what has been read."""
        super().commit_tensor(read_item, tensor)
        self._loaded(tensor.nbytes)

    lookup_tensor = _chunk

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        """Keep our objects: the default planner replaces unknown types by None."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator
