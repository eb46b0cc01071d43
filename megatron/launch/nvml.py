"""What NVIDIA's management library (NVML) says about the GPUs of this machine.

NVML comes with the driver, and also under WSL, where there is no /dev/nvidia*. Its Python binding, nvidia-ml-py, is a
single file that loads the driver's library when it is asked.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml

LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Gpu:
    """One card, in the order of the PCI bus. total, used: bytes, 0 where the card has no memory of its own."""

    uuid: str
    name: str
    total: int
    used: int
    processes: tuple[int, ...]  # that compute on it, as far as this machine or container can see them


@dataclass(frozen=True)
class Found:
    """The cards and their driver. problem: why NVML cannot speak to the driver; there are then no cards."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)  # the newest CUDA that the driver runs; (0, 0): not known
    problem: str = ""


def find_gpus() -> Found | None:
    """The cards of this machine; None where there is no NVML, and thus no driver."""
    try:
        pynvml.nvmlInit()
        try:
            return Found(tuple(_gpus()), pynvml.nvmlSystemGetDriverVersion(), _cuda())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError_LibraryNotFound:
        return None
    except pynvml.NVMLError as error:
        return Found(problem=str(error))


def _gpus() -> Iterator[Gpu]:
    for index in range(pynvml.nvmlDeviceGetCount()):
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid, name = pynvml.nvmlDeviceGetUUID(device), pynvml.nvmlDeviceGetName(device)
        yield Gpu(uuid, name, *_memory(device), _processes(device))


def _cuda() -> tuple[int, int]:
    with suppress(pynvml.NVMLError):
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return number // 1000, number % 1000 // 10
    return 0, 0


def _memory(device: Any) -> tuple[int, int]:
    """Total and used; version 2 leaves out what the driver reserves for itself. Zeros where there is no answer."""
    for version in (pynvml.nvmlMemory_v2, None):
        with suppress(pynvml.NVMLError):
            memory = pynvml.nvmlDeviceGetMemoryInfo(device, version)
            return memory.total, memory.used
    return 0, 0


def _processes(device: Any) -> tuple[int, ...]:
    with suppress(pynvml.NVMLError, pynvml.NVMLLibraryMismatchError):  # the latter: a driver before 510
        return tuple(process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device))
    return ()
