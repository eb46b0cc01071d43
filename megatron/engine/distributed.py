"""Start and stop of torch.distributed.

Works under our launcher, under `torchrun`, or in a plain `python` process, which is a world of one rank.
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
    """Join the process group and return the grid that `layout` describes; see `start`."""
    return start(
        layout.pipe, layout.tensor, backend, context=layout.context, sequence_parallel=layout.sequence_parallel
    )


def start(
    pipe: int = 1,
    tensor: int = 1,
    backend: str | None = None,
    timeout_minutes: float = 30,
    *,
    context: int = 1,
    sequence_parallel: bool = False,
) -> ParallelGrid:
    """Join the process group and return the grid of ranks.

    pipe, tensor, context: sizes of pipeline, tensor and context parallelism; data parallelism takes the rest of the
    world.
    backend: by default NCCL if a GPU is visible, gloo otherwise.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if dist.is_initialized():  # by the caller, who chose the backend
        backend = dist.get_backend()
    on_gpu = torch.cuda.is_available() and backend != "gloo"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(backend or ("nccl" if on_gpu else "gloo"), timeout=timedelta(minutes=timeout_minutes))
    return ParallelGrid.create(pipe, tensor, context, sequence_parallel, device="cuda" if on_gpu else "cpu")


def be_deterministic() -> list[str]:
    """Make every operation of this process deterministic. Call it before the first one.

    An operation without a deterministic form then raises RuntimeError with its name. Returns lines for the log.
    """
    # the smallest workspace with which cuBLAS is deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # torch would also fill all new memory to expose reads of uninitialised tensors; that costs time, and we have none
    cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False
    return ["deterministic: every operation gives the same bits each time"]


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
