"""What NVIDIA's management library (NVML) says about the GPUs of this machine. Standard library only.

NVML comes with the driver, and also under WSL, where there is no /dev/nvidia*. The calls and structures are those of
its header nvml.h (https://docs.nvidia.com/deploy/nvml-api/); they stay the same from driver to driver.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96  # NVML's longest: NVML_DEVICE_UUID_V2_BUFFER_SIZE and NVML_DEVICE_NAME_V2_BUFFER_SIZE
_MOST_PROCESSES = 64


class _Memory(ctypes.Structure):
    """nvmlMemory_t: bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Memory2(ctypes.Structure):
    """nvmlMemory_v2_t: bytes; here `used` leaves out what the driver reserves for itself."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t."""

    _fields_ = (
        ("process", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


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


class NvmlError(Exception):
    """A call that NVML refused, in its words."""


def find_gpus() -> Found | None:
    """The cards of this machine; None where there is no NVML, and thus no driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    nvml = _Nvml(library)
    try:
        with nvml.running():
            return Found(tuple(nvml.gpus()), nvml.text("nvmlSystemGetDriverVersion"), nvml.cuda())
    except NvmlError as error:
        return Found(problem=str(error))


class _Nvml:
    """Calls into the library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    @contextmanager
    def running(self) -> Iterator[None]:
        self._call("nvmlInit_v2")
        try:
            yield
        finally:
            self._call("nvmlShutdown")

    def gpus(self) -> Iterator[Gpu]:
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        for index in range(count.value):
            device = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
            uuid, name = self.text("nvmlDeviceGetUUID", device), self.text("nvmlDeviceGetName", device)
            yield Gpu(uuid, name, *self._memory(device), self._processes(device))

    def text(self, function: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call(function, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def cuda(self) -> tuple[int, int]:
        number = ctypes.c_int()
        with suppress(NvmlError):
            self._call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def _memory(self, device: ctypes.c_void_p) -> tuple[int, int]:
        """Total and used, by the newer call where the driver has it; zeros where neither has an answer."""
        newer, older = _Memory2(version=ctypes.sizeof(_Memory2) | 2 << 24), _Memory()
        with suppress(NvmlError):
            self._call("nvmlDeviceGetMemoryInfo_v2", device, ctypes.byref(newer))
            return newer.total, newer.used
        with suppress(NvmlError):
            self._call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(older))
        return older.total, older.used

    def _processes(self, device: ctypes.c_void_p) -> tuple[int, ...]:
        count, found = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
        try:
            self._call("nvmlDeviceGetComputeRunningProcesses_v3", device, ctypes.byref(count), found)
        except NvmlError:
            return ()
        return tuple(one.process for one in found[: count.value])

    def _call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises NvmlError where it fails, or the driver is too old to have it."""
        function = getattr(self._library, name, None)
        if function is None:
            raise NvmlError(f"{LIBRARY} has no function {name}")
        code = function(*arguments)
        if code:
            describe = self._library.nvmlErrorString
            describe.restype = ctypes.c_char_p
            raise NvmlError(describe(code).decode(errors="replace"))
