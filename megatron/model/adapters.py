"""Attach low-rank adapters to the linear layers of a block that the plan names."""

from typing import cast

from torch import nn

from megatron.config.parameter_shapes import adapters_of
from megatron.config.plan import ModelPlan
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.lora import ColumnAdapter, HeadsAdapter, RowAdapter


def attach_adapters(module: nn.Module, name: str, model: ModelPlan, grid: ParallelGrid) -> None:
    """Give the linear layers of `module`, the layer of this global name, the adapters of `model.lora`."""
    lora, parts = model.lora, dict[str, dict[str, nn.Module]]()
    if lora is None or not name.startswith("blocks."):
        return
    for adapter in adapters_of(model, int(name.removeprefix("blocks."))):
        kind = ColumnAdapter if adapter.outputs_are_sharded else RowAdapter
        made = kind(adapter.inputs, adapter.outputs, lora.rank, lora.alpha / lora.rank, lora.dropout, grid)
        if adapter.part is None:
            _linear(module, adapter.layer).lora = made
        else:
            parts.setdefault(adapter.layer, {})[adapter.part] = made
    for layer, adapters in parts.items():
        shared = model.num_attention_heads // model.num_kv_heads
        _linear(module, layer).lora = HeadsAdapter(adapters, shared, model.head_size)


def _linear(module: nn.Module, name: str) -> ColumnParallelLinear | RowParallelLinear:
    return cast(ColumnParallelLinear | RowParallelLinear, module.get_submodule(name))
