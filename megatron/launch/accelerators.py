"""The GPUs and cores of this machine, determined without importing torch, which takes seconds."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import UserError
from megatron.launch.nvml import find_gpus
from megatron.launch.torch_build import installed_torch

# The value of CUDA_VISIBLE_DEVICES that hides all GPUs from a rank on the CPU.
NO_GPU = "-1"


def visible_gpus(environment: Mapping[str, str], backend: str | None = None) -> list[str]:
    """Indices (or UUIDs) of the GPUs that ranks may use; none where torch was built without CUDA or with gloo."""
    if environment.get("DS_ACCELERATOR") == "cpu" or backend == "gloo":
        return []
    torch = installed_torch()
    if torch is None or torch.cuda is None:
        return []
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", NO_GPU)]
    found = find_gpus()
    if found is not None and not found.problem:
        return [str(index) for index in range(len(found.gpus))]
    files = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    return [str(index) for index in range(len(files))]


def devices_of_slots(slots: Sequence[int], gpus: Sequence[str]) -> tuple[str, ...]:
    """The device of each slot of this machine; without GPUs a slot is a process. Raises UserError."""
    if not gpus:
        return (NO_GPU,) * len(slots)
    if len(slots) > len(gpus):
        raise UserError(f"{len(slots)} ranks are asked for, but {len(gpus)} GPUs are visible; lower num_gpus")
    missing = [slot for slot in slots if slot >= len(gpus)]
    if missing:
        raise UserError(f"slot {missing[0]} is asked for, but {len(gpus)} GPUs are visible, counted from 0")
    return tuple(gpus[slot] for slot in slots)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
