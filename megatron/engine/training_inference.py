"""The model of a training engine for inference between two steps: its weights as they are, without a copy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.plan import Plan
from megatron.engine.deepspeed_internals import layers_of_stage
from megatron.engine.inference import InferenceEngine
from megatron.engine.settings import DTYPES
from megatron.model.cache import KVCache
from megatron.model.layer import Targets
from megatron.parallel.grid import LockstepGrid, ParallelGrid


class TrainingInference(InferenceEngine):
    """An `InferenceEngine` on the module of a training engine, which must be in evaluation mode."""

    def __init__(self, module: nn.Module, grid: ParallelGrid, plan: Plan, begin: Callable[[], None]) -> None:
        """begin: called before each forward pass.

        With ZeRO 3 all replicas have to compute the same, because each layer is gathered from all of them.
        """
        self._begin = begin
        self.grid = LockstepGrid.of(grid) if plan.engine.zero_stage == 3 else grid
        self.dtype, self.hidden_size = DTYPES[plan.engine.precision], plan.model.hidden_size
        blocks = range(plan.model.num_layers)
        if grid.size("pipe") > 1:
            numbers, calls = layers_of_stage(module)
            blocks = range(max(0, numbers.start - 1), max(0, min(numbers.stop - 1, len(blocks))))
            self.module = _Layers(_in_sequence(calls))  # type: ignore[assignment]
        else:
            self.module = _Layers(module)  # type: ignore[assignment]
        self.blocks = blocks
        self._sending = None

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, document_start: Tensor | None = None) -> Tensor:
        """As `InferenceEngine`."""
        self._begin()
        return super().hidden(tokens, cache, document_start)


class _Layers:
    """Layers without gradients, and outside of inference mode: what ZeRO 3 gathers there could not train."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(
        self, inputs: Any, cache: Any = None, layers: slice = slice(None), targets: Targets | None = None
    ) -> Any:
        """As `Sequential`."""
        with torch.inference_mode(False), torch.no_grad():
            return self._run(inputs, cache, layers, targets)


def _in_sequence(calls: list[Callable[..., Any]]) -> Callable[..., Any]:
    def run(inputs: Any, cache: Any, layers: slice, targets: Targets | None) -> Any:
        *others, last = calls[layers]
        for call in others:
            inputs = call(inputs, cache)
        return last(inputs, cache) if targets is None else last(inputs, targets=targets)

    return run
