"""The model between two steps as the decoding engine takes it: its weights as they are, and the training untouched."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from megatron.inference import TrainedModel
from megatron.training.hooks.base import Run


@contextmanager
def decoding(run: Run, phase: str) -> Iterator[TrainedModel]:
    """The model, on all ranks. Measured time and random numbers go on after the block as if it were not there.

    phase: for the watchdog, which is told at each forward pass.
    """
    with (
        run.clock.paused(),
        kept_random_states(),
        run.engine.inference(lambda: run.liveness.begin(phase)) as inference,
    ):
        on_gpu = inference.grid.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()  # for the keys and values
        yield TrainedModel(inference, inference.grid, run.plan, run.tokenizer, few_widths=on_gpu)


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Set all random generators back after the block."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python)
    np.random.set_state(arrays)
