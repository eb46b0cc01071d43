"""A copy of a rank's state in host memory, which a thread writes while training goes on.

The memory is allocated once and filled again by each save. On a GPU it is pinned: the copies are queued behind the
kernels of the last step, and the next step behind the copies, so the training thread waits for none of them.
"""

import math
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron.checkpoint.chunks import LocalChunks
from megatron.errors import UserError

_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every element's size
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts, as torch's own pinned memory is


class Snapshot:
    """Host memory for the chunks of one rank."""

    def __init__(self, state: Mapping[str, LocalChunks], device: torch.device) -> None:
        """Allocate memory for `state`: its own size, and up to 63 bytes for each chunk.

        Raises UserError where CUDA cannot pin the memory.
        """
        sizes = [_padded(chunk.nbytes) for local in state.values() for chunk in local.chunks.values()]
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        self.bytes = memory.nbytes
        self._copied = None
        if device.type == "cuda":
            if memory.nbytes:
                _pin(memory)
                weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, memory.data_ptr())
            self._copied = torch.cuda.Event(blocking=True)  # the waiting thread leaves its core to others
        # Each chunk is a tensor with a storage of its own: torch's writer would copy views of a larger one once more.
        parts = iter(torch.split(memory, sizes))
        self.chunks = {name: local.like(lambda chunk: _alias(next(parts), chunk)) for name, local in state.items()}

    def fill(self, state: Mapping[str, LocalChunks]) -> None:
        """Copy `state`, of the same names and shapes, without waiting. The last copy must have been written."""
        for name, local in state.items():
            for offset, chunk in local.chunks.items():
                self.chunks[name].chunks[offset].copy_(chunk, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Wait until `chunks` holds what `fill` was given, from any thread."""
        if self._copied is not None:
            self._copied.synchronize()


def _padded(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT


def _alias(memory: Tensor, chunk: Tensor) -> Tensor:
    """A tensor like `chunk` in the first bytes of `memory`, which it keeps alive."""
    return torch.from_numpy(memory.numpy()[: chunk.nbytes]).view(chunk.dtype).view(chunk.shape)


def _pin(memory: Tensor) -> None:
    """Pin memory in place: torch's allocator of pinned memory would round the size up to a power of two."""
    failure = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, _PORTABLE))
    if failure:
        raise UserError(
            f"async_save: {memory.nbytes / 2**30:.2f} GiB of host memory for a copy of this rank's state cannot be "
            f"pinned (CUDA error {failure}); free memory on the host, or save without async_save"
        )
