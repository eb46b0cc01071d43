"""Start and stop of torch.distributed.

Works under our launcher, under `torchrun`, or in a plain `python` process, which is a world of one rank.
"""

import os
import socket
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron.config.plan import EnginePlan, Layout
from megatron.errors import UserError
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
    backend: by default NCCL if a GPU is visible, gloo otherwise. Raises UserError where this rank has no GPU for NCCL.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = "0"  # the kernel gives the store a free one
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if dist.is_initialized():  # by the caller, who chose the backend
        backend = dist.get_backend()
    on_gpu = backend == "nccl" or (torch.cuda.is_available() and backend != "gloo")
    if on_gpu:
        torch.cuda.set_device(_own_gpu())
    if not dist.is_initialized():
        backend = backend or ("nccl" if on_gpu else "gloo")
        # Bound to its device, NCCL connects now, where a failure is a failure of the start, and splits later groups off
        # this one. Ranks that are not in a new group take part in the split even if that group is a gloo one, of which
        # the others know nothing: so every gloo group beside NCCL has to hold all ranks.
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), device_id=device)
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


def choose_matmul_precision(settings: EnginePlan, device: torch.device) -> list[str]:
    """Decide how products of fp32 matrices are computed from now on.

    Returns lines for the log where it matters, as it does for bf16 on a CPU without instructions for it.
    """
    torch.set_float32_matmul_precision(settings.fp32_matmul_precision)
    if device.type == "cpu" and settings.precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return [
            "products: this CPU lacks the instructions for bfloat16 (AVX-512), without which torch takes many times as "
            "long as in fp32; write precision: fp32"
        ]
    if device.type != "cuda" or settings.precision != "fp32":
        return []
    if settings.fp32_matmul_precision == "highest":
        return ["products: fp32 (fp32_matmul_precision: highest); in TF32 (high) they are up to eight times as fast"]
    return [f"products: TF32 (fp32_matmul_precision: {settings.fp32_matmul_precision})"]


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_gpu() -> int:
    """The index of this rank's GPU. Raises UserError where there is none."""
    index, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index < visible:
        return index
    among = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    raise UserError(
        f"rank {os.environ['RANK']} needs GPU {index} of {socket.gethostname()}, but torch {torch.__version__} sees "
        f"{visible} there (CUDA_VISIBLE_DEVICES: {among}); start no more ranks than GPUs, or set "
        "distributed_backend: gloo to compute on the CPU"
    )
