"""A list of layers for generation and evaluation: forward only, no DeepSpeed, no gradients. Floor 4."""

from typing import Any

import torch
from torch import Tensor

from megatron.engine.modules import Sequential
from megatron.engine.optimizer_state import ModuleState
from megatron.model.layer import Layer
from megatron.parallel.grid import ParallelGrid


class InferenceEngine:
    """The whole model on this rank, or its tensor-parallel share."""

    def __init__(self, layers: list[Layer], grid: ParallelGrid, dtype: torch.dtype = torch.float32) -> None:
        """Build `layers` with weights of `dtype` on the grid's device."""
        self.module = Sequential(layers).to(device=grid.device, dtype=dtype).eval().requires_grad_(False)
        self.state = ModuleState(self.module)
        self.grid = grid
        self.dtype = dtype

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Tokens [b, s] in, logits [b, s, v/tp] out. With a cache, `tokens` continue what it holds."""
        logits: Tensor = self.module(tokens.to(self.grid.device), cache)
        return logits
