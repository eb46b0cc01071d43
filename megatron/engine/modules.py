"""Builds one module from a list of layers: a sequential one, or a stage of DeepSpeed's pipeline.

Parameters carry their global names, so both kinds agree on them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from megatron.config.parameter_shapes import trains
from megatron.engine.deepspeed_internals import head_as_loss
from megatron.engine.recompute import Checkpoint, recompute_all
from megatron.model.layer import Layer, Targets
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.parameter import PlacedParameter

Call = Callable[..., Any]
Prepare = Callable[[nn.Module], object]


class Sequential(nn.Module):
    """All layers in sequence, on one rank."""

    def __init__(
        self,
        layers: list[Layer],
        recompute_layers: int = 0,
        checkpoint: Checkpoint = recompute_all,
        prepare: Prepare = lambda module: None,
    ) -> None:
        """Build every layer. recompute_layers: N > 0 recomputes groups of N blocks in the backward pass.

        checkpoint: runs a group whose activations are recomputed. prepare: applied to each module as it is built.
        """
        super().__init__()
        self.layers = nn.ModuleList()
        self.recompute_layers, self.checkpoint = recompute_layers, checkpoint
        self._calls: list[tuple[Call, bool]] = []
        tied: dict[str, nn.Module] = {}
        for layer in layers:
            module = tied.get(layer.tied) if layer.tied else None
            if module is None:
                module = layer.build()
                prepare(module)
                self.layers.append(module)
                if layer.tied:
                    tied[layer.tied] = module
            call = partial(layer.tied_forward, module) if layer.tied_forward else module
            self._calls.append((call, layer.recompute))

    def forward(
        self, inputs: Any, cache: Any = None, layers: slice = slice(None), targets: Targets | None = None
    ) -> Any:
        """Tokens [b, s] in, logits [b, s, v/tp] out, or with `targets` the loss; with a key-value cache in decoding.

        layers: which of the layers run, on the input of the first one of these.
        """
        chosen = self._calls[layers]
        if cache is not None:
            for call, _ in chosen:
                inputs = call(inputs, cache)
            return inputs
        if targets is not None:
            chosen[-1] = partial(chosen[-1][0], targets=targets), False
        recompute = self.recompute_layers if self.training else 0
        for calls, in_checkpoint in _segments(chosen, recompute):
            run = partial(_chain, calls)
            inputs = self.checkpoint(run, inputs) if in_checkpoint else run(inputs)
        return inputs


def pipeline_module(
    layers: list[Layer],
    grid: ParallelGrid,
    partition_method: str,
    recompute_layers: int,
    checkpoint: Checkpoint = recompute_all,
    prepare: Prepare = lambda module: None,
) -> nn.Module:
    """This rank's stage of `layers`, as DeepSpeed's PipelineModule; arguments as of `Sequential`.

    The last stage gives the input of the head; the module's `loss_fn` is the head, which has the loss.
    """
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    def build(layer: Layer) -> nn.Module:
        module = layer.build()
        prepare(module)
        return module

    # `build` builds our layer, where DeepSpeed's would call a class with arguments
    class Spec(LayerSpec):
        def __init__(self, layer: Layer) -> None:
            super().__init__(layer.module_class)
            self.layer = layer

        def build(self, log: bool = False) -> nn.Module:
            return build(self.layer)

    class TiedSpec(TiedLayerSpec):
        def __init__(self, layer: Layer) -> None:
            super().__init__(layer.tied, layer.module_class, forward_fn=layer.tied_forward, tied_weight_attr="weight")
            self.layer = layer

        def build(self, log: bool = False) -> nn.Module:
            return build(self.layer)

    module: nn.Module = PipelineModule(
        [TiedSpec(layer) if layer.tied else Spec(layer) for layer in layers],
        topology=PipeModelDataParallelTopology(
            num_pp=grid.size("pipe"), num_mp=grid.size("tensor"), num_dp=grid.size("data")
        ),
        partition_method=partition_method,
        activation_checkpoint_interval=recompute_layers,
        activation_checkpoint_func=checkpoint,
        checkpointable_layers=sorted({layer.module_class.__name__ for layer in layers if layer.recompute}),
    )
    if grid.rank("pipe") == grid.size("pipe") - 1:
        head_as_loss(module)
    return module


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the parameters of `module` `dtype`; buffers stay as they are."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


def freeze_parameters(module: nn.Module, patterns: Sequence[str]) -> None:
    """Make the parameters whose global names match any of `patterns` need no gradient."""
    for parameter in module.parameters():
        parameter.requires_grad_(trains(cast(PlacedParameter, parameter).global_name, patterns))


def _chain(calls: list[Call], inputs: Any) -> Any:
    for call in calls:
        inputs = call(inputs)
    return inputs


def _segments(calls: list[tuple[Call, bool]], recompute_layers: int) -> Iterator[tuple[list[Call], bool]]:
    """Split the layers into groups of at most `recompute_layers` blocks to recompute, and single layers between."""
    group: list[Call] = []
    for call, may_recompute in calls:
        if may_recompute and recompute_layers:
            group.append(call)
            if len(group) == recompute_layers:
                yield group, True
                group = []
            continue
        if group:
            yield group, True
            group = []
        yield [call], False
    if group:
        yield group, True
