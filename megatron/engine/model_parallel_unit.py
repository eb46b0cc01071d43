"""Our grid behind the interface that DeepSpeed calls a model parallel unit."""

import torch.distributed as dist

from megatron.parallel.grid import ParallelGrid


class ModelParallelUnit:
    """The `mpu` of `deepspeed.initialize` for a module that is not a pipeline."""

    def __init__(self, grid: ParallelGrid) -> None:
        self._grid = grid

    def get_model_parallel_rank(self) -> int:
        """Rank along the tensor-parallel axis."""
        return self._grid.rank("tensor")

    def get_model_parallel_world_size(self) -> int:
        """Ranks along the tensor-parallel axis."""
        return self._grid.size("tensor")

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group."""
        return self._grid.group("tensor")

    def get_data_parallel_rank(self) -> int:
        """Rank among the replicas: the data and context axes together."""
        return self._grid.rank("replica")

    def get_data_parallel_world_size(self) -> int:
        """Ranks that hold the same weights."""
        return self._grid.size("replica")

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The group of replicas, over which gradients are averaged."""
        return self._grid.group("replica")

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
