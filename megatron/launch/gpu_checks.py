"""Whether the ranks of this machine can use their GPUs, answered before they start and without importing torch."""

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.errors import UserError
from megatron.launch.nvml import LIBRARY, Found, Gpu, find_gpus
from megatron.launch.torch_build import TorchBuild, installed_torch

# The oldest drivers of a CUDA version (https://docs.nvidia.com/cuda/cuda-toolkit-release-notes): a driver runs programs
# of its own major version, whatever their minor version, and of those before.
OLDEST_DRIVER = {12: "525", 13: "580"}
# The memory of processes that have just been ended is free after a moment.
FREEING_SECONDS = 5.0
_WSL_DEVICE = Path("/dev/dxg")
GIB = 2**30


def check_gpus(
    environment: Mapping[str, str], backend: str | None, chosen: Sequence[str], most_in_use: float
) -> list[str]:
    """Check the GPUs of this machine's ranks; returns warnings.

    chosen: index or UUID of each rank's GPU, empty where ranks use the CPU. most_in_use: the largest share of a GPU's
    memory that other processes may hold. Raises UserError with everything that is in the way.
    """
    torch, found = installed_torch(), find_gpus()
    if not chosen:
        return _on_cpu(environment, backend, torch, found)
    problems = [*_wrong_software(torch, found), *_missing(chosen, found)]
    problems = problems or _busy(chosen, most_in_use)
    if problems:
        raise UserError(*problems)
    return []


def _on_cpu(
    environment: Mapping[str, str], backend: str | None, torch: TorchBuild | None, found: Found | None
) -> list[str]:
    """Raise UserError where GPUs are asked for; warn where there are some that nobody has renounced."""
    accelerator, visible = environment.get("DS_ACCELERATOR"), environment.get("CUDA_VISIBLE_DEVICES")
    version = torch.version if torch else ""
    if accelerator == "cpu":
        why = "DS_ACCELERATOR=cpu hides them; unset it"
    elif torch is not None and torch.cuda is None:
        why = f"the installed torch {version} is built without CUDA; install one that is built with it"
    elif visible is not None:
        why = f'CUDA_VISIBLE_DEVICES is "{visible}"; unset it, or name the GPUs in it'
    elif found is None:
        why = f"there is no NVIDIA driver ({LIBRARY} cannot be loaded); install it, or give the container --gpus all"
    else:
        why = f"the driver reports none ({found.problem or 'no device'}); nvidia-smi says more"
    if backend == "nccl" or accelerator == "cuda":
        asked = "distributed_backend: nccl" if backend == "nccl" else "DS_ACCELERATOR=cuda"
        raise UserError(f"{asked} needs GPUs, but {why}; distributed_backend: gloo computes on the CPU")
    if backend == "gloo" or accelerator == "cpu" or visible is not None:
        return []
    if found is not None and (found.gpus or found.problem):
        names = ", ".join(sorted({gpu.name for gpu in found.gpus})) or "a driver"
        return [f"the run uses the CPU although there is {names}: {why}. DS_ACCELERATOR=cpu chooses the CPU in silence"]
    if found is None and _WSL_DEVICE.exists():
        return [f"the run uses the CPU although WSL has a GPU ({_WSL_DEVICE}): {why}"]
    return []


def _wrong_software(torch: TorchBuild | None, found: Found | None) -> list[str]:
    problems = []
    if torch is not None and not torch.has_nccl():
        problems.append(
            f"the installed torch {torch.version} is built without NCCL, by which GPUs communicate; install one with "
            "it, or set distributed_backend: gloo to compute on the CPU"
        )
    if found is not None and found.problem:
        why = found.problem.rstrip(".")
        problems.append(f"the NVIDIA driver cannot be used: {why}; reload it, or restart the machine")
    if torch is None or torch.cuda is None or found is None or found.cuda == (0, 0) or found.cuda[0] >= torch.cuda[0]:
        return problems
    needed = OLDEST_DRIVER.get(torch.cuda[0])
    ways = f"install driver {needed} or newer" if needed else "install a newer driver"
    return [
        *problems,
        f"the NVIDIA driver {found.driver} runs CUDA {_dotted(found.cuda)}, but the installed torch {torch.version} is "
        f"built for CUDA {_dotted(torch.cuda)}; {ways}, or a torch for CUDA {found.cuda[0]}",
    ]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _missing(chosen: Sequence[str], found: Found | None) -> list[str]:
    """GPUs that are named but do not exist, or are named twice."""
    problems = [
        f"CUDA_VISIBLE_DEVICES names GPU {name} more than once; each rank needs a GPU of its own"
        for name in dict.fromkeys(chosen)
        if chosen.count(name) > 1
    ]
    if found is None or found.problem:
        return problems
    there = f"0 to {len(found.gpus) - 1}" if found.gpus else "none"
    return problems + [
        f"GPU {name} is asked for (CUDA_VISIBLE_DEVICES), but this machine has {len(found.gpus)}: {there}"
        for name in dict.fromkeys(chosen)
        if not name.startswith("MIG") and _card(name, found) is None
    ]


def _busy(chosen: Sequence[str], most_in_use: float) -> list[str]:
    """GPUs of which other processes hold too much memory, and still do after `FREEING_SECONDS`."""
    deadline = time.monotonic() + FREEING_SECONDS
    while True:
        found = find_gpus() or Found()
        cards = [(name, card) for name in chosen if (card := _card(name, found)) is not None]
        busy = [(name, card) for name, card in cards if card.used > most_in_use * card.total]
        if not busy or time.monotonic() > deadline:
            return [_busy_in_words(name, card, most_in_use) for name, card in busy]
        time.sleep(0.25)


def _busy_in_words(name: str, card: Gpu, most_in_use: float) -> str:
    held_by = ", ".join(f"{process} ({_program(process)})" for process in card.processes) or "not visible from here"
    return (
        f"GPU {name} ({card.name}): other processes hold {card.used / GIB:.1f} of {card.total / GIB:.1f} GiB, and "
        f"max_gpu_memory_in_use is {most_in_use:g} of it: {held_by}; end them, choose other GPUs with "
        "CUDA_VISIBLE_DEVICES, or raise max_gpu_memory_in_use (1: not checked)"
    )


def _program(process: int) -> str:
    try:
        return Path(f"/proc/{process}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return "not visible from here"


def _card(name: str, found: Found) -> Gpu | None:
    """The card of an index in the order of the PCI bus, or of a UUID or its beginning."""
    if re.fullmatch(r"[0-9]+", name):
        return found.gpus[int(name)] if int(name) < len(found.gpus) else None
    return next((gpu for gpu in found.gpus if gpu.uuid.startswith(name)), None)
