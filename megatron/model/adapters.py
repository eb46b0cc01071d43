"""Attach low-rank adapters to the linear layers of a block that the plan names."""

from typing import cast

from torch import nn

from megatron.config.parameter_shapes import adapters_of
from megatron.config.plan import ModelPlan
from megatron.model.shared_heads import key_exchange
from megatron.parallel.grid import ParallelGrid
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.lora import ColumnAdapter, HeadsAdapter, RowAdapter


def attach_adapters(module: nn.Module, name: str, model: ModelPlan, grid: ParallelGrid) -> None:
    """Give the linear layers of `module`, the layer of this global name, the adapters of `model.lora`."""
    lora, parts = model.lora, dict[str, dict[str, nn.Module]]()
    if lora is None or not name.startswith("blocks."):
        return
    shared = model.queries_per_key(grid.size("tensor") * grid.size("context"))
    for adapter in adapters_of(model, int(name.removeprefix("blocks."))):
        linear = cast(ColumnParallelLinear | RowParallelLinear, module.get_submodule(adapter.layer))
        sizes = adapter.inputs, adapter.outputs, lora.rank, lora.alpha / lora.rank, lora.dropout
        made: nn.Module
        if isinstance(linear, RowParallelLinear):
            made = RowAdapter(*sizes, grid)
        elif adapter.part is None:
            made = ColumnAdapter(*sizes, grid, linear.exchange)
        else:
            made = ColumnAdapter(*sizes, grid, None if adapter.part == "query" else key_exchange(model, grid))
        if adapter.part is None:
            linear.lora = made
        else:
            parts.setdefault(adapter.layer, {})[adapter.part] = made
    for layer, adapters in parts.items():
        module.get_submodule(layer).lora = HeadsAdapter(adapters, shared, model.head_size)
