"""Where a rank stands among all ranks, and the process groups it belongs to.

Floor 2. One object, made once per process and handed down; no module-level state.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Axis = Literal["pipe", "data", "context", "model"]
# Outermost to innermost, the order DeepSpeed's topology uses: tensor-parallel neighbours share a node.
AXES: tuple[Axis, ...] = ("pipe", "data", "context", "model")


@dataclass(frozen=True)
class ParallelGrid:
    """The pipe x data x context x model grid of ranks."""

    mesh: DeviceMesh

    @classmethod
    def create(cls, pipe: int = 1, model: int = 1, device: str = "cpu") -> "ParallelGrid":
        """Arrange the ranks of the running process group; the data axis takes what is left.

        pipe: stages of the pipeline. model: tensor-parallel size. device: "cpu" or "cuda".
        Collective: every rank of the world calls it. Raises ValueError when the world does not divide.
        """
        world = dist.get_world_size()
        if world % (pipe * model):
            raise ValueError(
                f"{world} ranks cannot be divided by pipe_parallel_size ({pipe}) x model_parallel_size ({model})"
            )
        return cls(init_device_mesh(device, (pipe, world // (pipe * model), 1, model), mesh_dim_names=AXES))

    def size(self, axis: Axis) -> int:
        """Ranks along `axis`."""
        return self.mesh.size(AXES.index(axis))

    def rank(self, axis: Axis) -> int:
        """This rank's place along `axis`, from 0."""
        return self.mesh.get_local_rank(axis)

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of the ranks that differ from this one along `axis` only."""
        return self.mesh.get_group(axis)

    @property
    def device(self) -> torch.device:
        """The device this rank computes on."""
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
