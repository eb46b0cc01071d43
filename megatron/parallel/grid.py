"""The grid of ranks and its process groups: one object per process, passed as an argument."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Ranks along "data" train on different samples, along "context" on different parts of the same samples. "replica" is
# both together: ranks with the same weights, whose gradients are averaged.
Axis = Literal["pipe", "data", "context", "tensor", "replica"]
# Outermost to innermost, as in DeepSpeed's topology: tensor-parallel neighbours share a node.
AXES: tuple[Axis, ...] = ("pipe", "data", "context", "tensor")
REPLICA_AXES: tuple[Axis, ...] = ("pipe", "replica", "tensor")


@dataclass(frozen=True)
class ParallelGrid:
    """The pipe x data x context x tensor grid of ranks."""

    mesh: DeviceMesh
    replicas: DeviceMesh  # the same ranks as pipe x replica x tensor
    sequence_parallel: bool = False  # tensor-parallel ranks shard the sequence between the matrices
    host_group: dist.ProcessGroup | None = None  # all ranks, for tensors in host memory; None: the default group
    groups: dict[Axis, dist.ProcessGroup] = field(default_factory=dict, init=False, compare=False, repr=False)
    sizes: dict[Axis, int] = field(default_factory=dict, init=False, compare=False, repr=False)
    ranks: dict[Axis, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Look everything up once: DeviceMesh takes a tenth of a small model's step of decoding to find it."""
        for axis in (*AXES, "replica"):
            mesh, name = self._mesh_of(axis)
            self.groups[axis] = mesh.get_group(name)
            self.sizes[axis] = mesh.size((mesh.mesh_dim_names or ()).index(name))
            self.ranks[axis] = mesh.get_local_rank(name)

    @classmethod
    def create(
        cls, pipe: int = 1, tensor: int = 1, context: int = 1, sequence_parallel: bool = False, *, device: str
    ) -> "ParallelGrid":
        """Arrange the ranks of the process group; the data axis takes the rest.

        pipe: stages of the pipeline. tensor: tensor-parallel size. context: ranks that share a sequence.
        device: "cpu" or "cuda".
        Collective over all ranks. Raises ValueError if the sizes do not divide the world size.
        """
        world, taken = dist.get_world_size(), pipe * context * tensor
        if world % taken:
            raise ValueError(
                f"{world} ranks cannot be divided by pipe_parallel_size ({pipe}) x context_parallel_size ({context}) "
                f"x model_parallel_size ({tensor})"
            )
        mesh = init_device_mesh(device, (pipe, world // taken, context, tensor), mesh_dim_names=AXES)
        replicas = mesh
        if context > 1:
            replicas = init_device_mesh(device, (pipe, world // (pipe * tensor), tensor), mesh_dim_names=REPLICA_AXES)
        # NCCL moves tensors of GPUs only, and what it moves the host must wait for
        host = dist.new_group(backend="gloo") if dist.get_backend() == "nccl" and world > 1 else None
        return cls(mesh, replicas, sequence_parallel and tensor > 1, host)

    def size(self, axis: Axis) -> int:
        """Number of ranks along `axis`."""
        return self.sizes[axis]

    def rank(self, axis: Axis) -> int:
        """This rank's index along `axis`, from 0."""
        return self.ranks[axis]

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of this rank along `axis`."""
        return self.groups[axis]

    def sum_over_data(self, number: int) -> int:
        """The sum of `number` over the data-parallel replicas, whose ranks all have the same one. No device waits.

        One all-reduce over all ranks in host memory.
        """
        if self.size("data") == 1:
            return number
        total = torch.tensor(number)
        dist.all_reduce(total, group=self.host_group)
        return int(total) * self.size("data") // self.mesh.size()

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Within the block tensor-parallel ranks share no sequence, whose length may then be any."""
        shared = self.sequence_parallel
        object.__setattr__(self, "sequence_parallel", False)
        try:
            yield
        finally:
            object.__setattr__(self, "sequence_parallel", shared)

    def own_tokens(self, length: int) -> slice:
        """The columns of this rank's `length` tokens in the whole sequence."""
        part = self.rank("context")
        if self.sequence_parallel:
            part = part * self.size("tensor") + self.rank("tensor")
        return slice(part * length, (part + 1) * length)

    def _mesh_of(self, axis: Axis) -> tuple[DeviceMesh, str]:
        if axis != "replica":
            return self.mesh, axis
        return self.replicas, "replica" if "replica" in (self.replicas.mesh_dim_names or ()) else "data"

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        if self.mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.mesh.device_type)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first stage of the pipeline."""
        return self.rank("pipe") == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage of the pipeline."""
        return self.rank("pipe") == self.size("pipe") - 1


class LockstepGrid(ParallelGrid):
    """A grid for work that all data-parallel replicas do alike: along "data" each is the only one."""

    @classmethod
    def of(cls, grid: ParallelGrid) -> "LockstepGrid":
        """The same ranks."""
        return cls(grid.mesh, grid.replicas, grid.sequence_parallel, grid.host_group)

    def size(self, axis: Axis) -> int:
        """Number of ranks along `axis`; 1 along "data"."""
        return 1 if axis == "data" else super().size(axis)

    def rank(self, axis: Axis) -> int:
        """This rank's index along `axis`; 0 along "data"."""
        return 0 if axis == "data" else super().rank(axis)


class LoneGrid(ParallelGrid):
    """The grid of this process alone, without a process group: for a model beside those of the run, or none.

    Collectives over its groups return their input. On the device "meta" a model has shapes and no memory.
    """

    def __init__(self, device: str = "cpu") -> None:
        object.__setattr__(self, "_device", torch.device(device))
        object.__setattr__(self, "_group", cast(Any, dist.ProcessGroup)(0, 1))

    def size(self, axis: Axis) -> int:
        """1."""
        return 1

    def rank(self, axis: Axis) -> int:
        """0."""
        return 0

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """A group of one rank, over which nothing can be sent."""
        return cast(dist.ProcessGroup, vars(self)["_group"])

    @property
    def device(self) -> torch.device:
        """The device that was asked for."""
        return cast(torch.device, vars(self)["_device"])
