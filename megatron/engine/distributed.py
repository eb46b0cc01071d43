"""Processes find each other.

Works under our launcher, `torchrun`, or as a plain `python` process, which is then a world of one rank.
"""

import os
import socket
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron.config.plan import Layout
from megatron.parallel.grid import ParallelGrid


def start_layout(layout: Layout, backend: str | None = None) -> ParallelGrid:
    """Join the process group and take a place in the grid that `layout` describes; see `start`."""
    return start(layout.pipe, layout.tensor, backend, context=layout.context, sequence_parallel=layout.sequence_parallel)


def start(
    pipe: int = 1,
    tensor: int = 1,
    backend: str | None = None,
    timeout_minutes: float = 30,
    *,
    context: int = 1,
    sequence_parallel: bool = False,
) -> ParallelGrid:
    """Join the process group and take a place in the grid.

    pipe, tensor, context: sizes of pipeline, tensor and context parallelism; data parallelism takes the rest of the
    world.
    backend: default NCCL where a GPU is visible, gloo otherwise.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if dist.is_initialized():  # by somebody else, who has chosen
        backend = dist.get_backend()
    on_gpu = torch.cuda.is_available() and backend != "gloo"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(backend or ("nccl" if on_gpu else "gloo"), timeout=timedelta(minutes=timeout_minutes))
    return ParallelGrid.create(pipe, tensor, context, sequence_parallel, device="cuda" if on_gpu else "cpu")


def be_deterministic() -> list[str]:
    """Let every operation of this process give the same bits each time. To be called before the first one.

    An operation that torch has in no such form then raises RuntimeError, and names itself. Returns what to tell.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # cuBLAS: the smallest that it promises the same bits for
    torch.use_deterministic_algorithms(True)
    # torch would also fill all new memory, to show reads of what nobody wrote; that costs, and nothing here does it
    cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False
    return ["deterministic: every operation in a form that gives the same bits each time"]


def stop() -> None:
    """Leave the process group; nothing to do when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
