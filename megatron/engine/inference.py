"""A list of layers for generation and evaluation: forward only, no DeepSpeed, no gradients."""

from typing import Any, cast

import torch
from torch import Tensor

from megatron.engine.modules import Sequential
from megatron.engine.optimizer_state import ModuleState
from megatron.model.layer import Layer
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter


class InferenceEngine:
    """The whole model on this rank, or its tensor-parallel share."""

    def __init__(self, layers: list[Layer], grid: ParallelGrid, dtype: torch.dtype = torch.float32) -> None:
        """Build `layers` with weights of `dtype` on the grid's device."""
        self.module = Sequential(layers).to(device=grid.device, dtype=dtype).eval().requires_grad_(False)
        self.state = ModuleState(self.module)
        self.grid = grid
        self.dtype = dtype

    @property
    def parameter_names(self) -> set[str]:
        """Global names of the parameters this rank computes with."""
        return {cast(PlacedParameter, parameter).global_name for parameter in self.module.parameters()}

    @torch.inference_mode()
    def forward(self, tokens: Tensor, cache: Any = None, document_start: Tensor | None = None) -> Tensor:
        """Tokens [b, s] in, logits [b, s, v/tp] out. With a cache, `tokens` continue what it holds.

        document_start: int32 [b, s], the column in which each token's document begins, for a model that keeps them
        apart; None: all in the first.
        """
        tokens = tokens.to(self.grid.device)
        flow = tokens if document_start is None else (tokens, document_start.to(self.grid.device))
        logits: Tensor = self.module(flow, cache)
        return logits
