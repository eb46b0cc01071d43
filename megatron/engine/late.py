"""A number of the device, read on the host without making the device wait."""

import torch
from torch import Tensor


class LateNumber:
    """A scalar whose copy travels to the host while the device goes on with whatever was queued after it."""

    def __init__(self, value: Tensor) -> None:
        """Begin to copy `value`, a scalar."""
        self._event = None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = value.detach().clone()

    def read(self) -> float:
        """The number. Waits for what was queued before the copy, and for nothing that came after."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
