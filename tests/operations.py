"""Counting the operations that a block of code runs."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts the operations of this thread by name, such as "aten::copy_"."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[operation.overloadpacket._qualified_op_name] += 1
        return operation(*args, **(kwargs or {}))
