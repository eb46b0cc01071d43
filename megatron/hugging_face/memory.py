"""The memory of a process that converts a model tensor by tensor."""

import ctypes
import sys
from contextlib import suppress

M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = 1 << 20  # bytes


def return_freed_tensors() -> None:
    """Let glibc give the memory of each freed tensor back to the system.

    Left alone, it raises the size from which it does so up to 32 MiB, and the holes that tensors below that leave in
    its heap add up to several times the largest tensor. Without effect on other systems.
    """
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)
