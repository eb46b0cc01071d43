"""The forward pass of a list of layers for generation and evaluation, without DeepSpeed and gradients."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron.config.parameter_shapes import is_adapter
from megatron.engine.modules import Sequential, cast_parameters
from megatron.engine.optimizer_state import ModuleState, draw_initial_values
from megatron.model.attention_kernels import kernels_for_decoding
from megatron.model.layer import Layer, Masking, Targets, pack, unpack
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter


class InferenceEngine:
    """The whole model on this rank, or its tensor-parallel shard."""

    def __init__(self, layers: list[Layer], grid: ParallelGrid, dtype: torch.dtype = torch.float32) -> None:
        """Build `layers` with weights of `dtype` on the grid's device; draw them if `layers` have a seed."""
        module = Sequential(layers, prepare=partial(cast_parameters, dtype=dtype))
        self.module = module.to(grid.device).eval().requires_grad_(False)
        self.state = ModuleState(self.module)
        draw_initial_values(self.module, self.state)
        self.grid = grid
        self.dtype = dtype
        self.is_adapted = any(is_adapter(name) for name in self.parameter_names)
        self.base: Path | None = None  # the checkpoint that adapters belong to

    @property
    def parameter_names(self) -> set[str]:
        """Global names of the parameters this rank computes with."""
        return {cast(PlacedParameter, parameter).global_name for parameter in self.module.parameters()}

    @torch.inference_mode()
    def hidden(self, tokens: Tensor, cache: Any = None, document_start: Tensor | None = None) -> Tensor:
        """Tokens [b, s] in, the input of the head [b, s, h] out. With a cache, `tokens` continue the sequences in it.

        document_start: int32 [b, s], the column in which each token's document begins; None: column 0.
        """
        tokens = tokens.to(self.grid.device)
        if document_start is not None:
            document_start = document_start.to(self.grid.device)
        with nullcontext() if cache is None else kernels_for_decoding():
            return unpack(self.module(pack(tokens, Masking(document_start)), cache, slice(-1)))[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """The head: any positions of `hidden`, [..., h] -> [..., v/tp]."""
        logits: Tensor = self.module(hidden, layers=slice(-1, None))
        return logits

    @torch.inference_mode()
    def loss(self, hidden: Tensor, targets: Targets) -> Tensor:
        """The head with its loss, summed over `hidden` [b, s, h]: a scalar in fp32."""
        loss: Tensor = self.module(hidden, layers=slice(-1, None), targets=targets)
        return loss
