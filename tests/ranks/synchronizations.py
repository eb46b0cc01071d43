"""Where a step waits for the device: counted on a CPU that passes itself off to DeepSpeed as a GPU.

A wait is a read of a tensor's values on the host, a copy from ordinary memory of the host (CUDA copies it through a
buffer of its own and waits), or a synchronization with device or stream. What is read on purpose from host memory is
counted too: on a CPU nothing tells it apart, so that a test has to name it.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# what reads values: all that decides the shape of a result, and every conversion to a number
_READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_consecutive,
    torch.ops.aten.repeat_interleave,
}
_INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
_LIBRARIES = (str(Path(torch.__file__).parent), __file__, "<frozen", "contextlib.py", "unittest")


class _Stream:
    """A stream of a device that works by itself."""

    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, enable_timing: bool = False) -> None: ...
    def record(self, _: Any = None) -> None: ...
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


class Waits(TorchDispatchMode):
    """Counts waits by the function that waits, such as "stage3.py has_overflow": 1."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        packet = operation._overloadpacket
        masks = packet in _INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        if packet in _READS or masks:
            self.note()
        return operation(*args, **(kwargs or {}))

    def note(self) -> None:
        """Count a wait for the innermost function outside of torch."""
        frame = sys._getframe(1)
        while frame.f_back is not None and any(part in frame.f_code.co_filename for part in _LIBRARIES):
            frame = frame.f_back
        self.found[f"{Path(frame.f_code.co_filename).name} {frame.f_code.co_name}"] += 1


@contextmanager
def device_of_its_own() -> Iterator[None]:
    """DeepSpeed takes the CPU for a device with streams, for which the host has to wait. Engines are built inside."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    stream, accelerator = _Stream(), get_accelerator()
    with ExitStack() as patches:
        for name, value in {
            "resolves_data_dependency": lambda: False,
            "is_synchronized_device": lambda: False,
            "current_stream": lambda *_: stream,
            "default_stream": lambda *_: stream,
        }.items():
            patches.enter_context(patch.object(accelerator, name, value))
        patches.enter_context(patch.object(type(accelerator), "Stream", property(lambda _: _Stream)))
        patches.enter_context(patch.object(type(accelerator), "Event", property(lambda _: _Event)))
        patches.enter_context(patch.object(torch.Tensor, "record_stream", lambda *_: None))
        yield


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count the waits of the block, inside `device_of_its_own`."""
    from deepspeed.accelerator import get_accelerator

    waits = Waits()

    def noted(function: Callable[..., Any], when: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                waits.note()
            return function(*args, **kwargs)

        return call

    def from_host(data: Any, *_: Any, device: Any = None, **__: Any) -> bool:
        return device is not None and not isinstance(data, torch.Tensor)

    with ExitStack() as patches:
        for owner, name in [
            (get_accelerator(), "synchronize"),
            (_Stream, "synchronize"),
            (_Event, "synchronize"),
            *((torch.Tensor, name) for name in ("tolist", "cpu", "numpy")),
        ]:
            patches.enter_context(patch.object(owner, name, noted(getattr(owner, name))))
        for name in ("tensor", "as_tensor"):
            patches.enter_context(patch.object(torch, name, noted(getattr(torch, name), from_host)))
        patches.enter_context(waits)
        yield waits.found
