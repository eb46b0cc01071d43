"""Processes find each other.

Floor 4. Works under our launcher, `torchrun`, or as a plain `python` process, which is then a world of one rank.
"""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron.parallel.grid import ParallelGrid


def start(pipe: int = 1, model: int = 1, backend: str | None = None, timeout_minutes: float = 30) -> ParallelGrid:
    """Join the process group and take a place in the grid.

    pipe, model: sizes of the pipeline and of tensor parallelism; data parallelism takes the rest of the world.
    backend: default NCCL where a GPU is visible, gloo otherwise.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    on_gpu = torch.cuda.is_available() and backend != "gloo"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(backend or ("nccl" if on_gpu else "gloo"), timeout=timedelta(minutes=timeout_minutes))
    return ParallelGrid.create(pipe=pipe, model=model, device="cuda" if on_gpu else "cpu")


def stop() -> None:
    """Leave the process group; nothing to do when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
