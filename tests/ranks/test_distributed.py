"""The start of torch.distributed: each rank has a device of its own."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist

from megatron.engine.distributed import start
from megatron.errors import UserError
from megatron.parallel.grid import AXES
from tests.ranks.run import run_ranks


def more_ranks_than_gpus() -> None:
    dist.destroy_process_group()
    os.environ["LOCAL_RANK"] = str(torch.cuda.device_count())
    with pytest.raises(
        UserError, match=r"rank 0 needs GPU \d+ of .*, but torch .* sees \d+ there .*start no more ranks"
    ):
        start(backend="nccl")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_rank_without_a_gpu_of_its_own_is_told_so_before_nccl_is():
    run_ranks(1, more_ranks_than_gpus)


def bound_to_its_gpu() -> None:
    dist.destroy_process_group()
    grid = start(backend="nccl")
    assert dist.group.WORLD.bound_device_id == grid.device == torch.device("cuda", 0)
    for axis in AXES:
        number = torch.ones(1, device=grid.device)
        dist.all_reduce(number, group=grid.group(axis))
        assert number.item() == grid.size(axis)
    host = dist.new_group(backend="gloo")
    number = torch.ones(1)
    dist.all_reduce(number, group=host)
    assert number.item() == dist.get_world_size()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # NCCL's barrier warns where it has to guess the device
        dist.barrier()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nccl_is_bound_to_the_gpu_of_its_rank_and_gloo_works_beside_it():
    run_ranks(1, bound_to_its_gpu)
