"""Reading a scalar from the device without stalling it."""

import torch
from torch import Tensor


class DeferredScalar:
    """A scalar copied to the host asynchronously, while the device runs the work queued after it."""

    def __init__(self, value: Tensor) -> None:
        """Start to copy `value`, a scalar."""
        self._event = None
        if value.is_cuda:
            self._host = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = value.detach().clone()

    def read(self) -> float:
        """The number. Waits for the work queued before the copy, and for nothing queued after it."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
