"""What the steps share: the device, tiny shapes for --quick, and building and freeing an engine."""

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from contenders import NEOX, ON_GPU, shape

ON_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
# of few words: products in bf16 are slow on most CPUs
TINY = shape(NEOX, 2, 64, 4, 128, 2) | {"padded_vocab_size": 512}


def keys_of(name: str, quick: bool) -> dict[str, Any]:
    """Configuration of a shape of bench/contenders.py; with --quick of a tiny model in its place."""
    return TINY if quick else ON_GPU[name]


def record(**figures: Any) -> None:
    """Print figures as a line of JSON."""
    print(json.dumps(figures), file=sys.__stdout__, flush=True)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if ON_CARD:
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object]) -> float:
    """How long a call takes, until the device is done."""
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def free() -> None:
    """Give the memory of what went out of scope back to the device, and forget compiled code."""
    torch._dynamo.reset()
    gc.collect()
    if ON_CARD:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
