"""Merge low-rank adapters into the weights of their base: a checkpoint of a whole model."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.converted import StoredWeight, write_converted
from megatron.checkpoint.reading import SafeReader, read_tensors, tensor_shapes
from megatron.checkpoint.store import find_base
from megatron.config.parameter_shapes import Adapter, adapters_of
from megatron.config.plan import ModelPlan
from megatron.engine.optimizer_state import MASTER


def merge_adapters(
    checkpoint: Path,
    model: ModelPlan,
    save: Path,
    config: Mapping[str, Any],
    base: str | None = None,
    done: Callable[[], object] = lambda: None,
) -> Path:
    """Write the base of the adapters in `checkpoint`, with W + alpha / rank * B A for W, into the folder `save`.

    model: with adapters. config: the flat configuration of the model without them. base: as of `find_base`. One tensor
    is in memory at a time. Returns the path of the checkpoint. Raises UserError and RunError as `write_converted`.
    """
    weights, adapters = SafeReader(find_base(checkpoint, base) / "state"), SafeReader(checkpoint / "state")
    found: dict[str, list[Adapter]] = {}
    for layer in range(model.num_layers):
        for each in adapters_of(model, layer):
            found.setdefault(f"blocks.{layer}.{each.layer}.weight", []).append(each)

    def merged(name: str) -> Tensor:
        whole = _read(weights, name)
        for each in found.get(name, []):
            prefix = name.partition(each.layer)[0] + each.name
            whole += adapter_weight(_read(adapters, f"{prefix}.a"), _read(adapters, f"{prefix}.b"), each, model)
        return whole

    suffix = f"/{MASTER}"
    shapes = {n.removesuffix(suffix): shape for n, shape in tensor_shapes(weights).items() if n.endswith(suffix)}
    stored = {name: StoredWeight(shape, partial(merged, name)) for name, shape in shapes.items()}
    return write_converted(save, stored, config, done)


def adapter_weight(a: Tensor, b: Tensor, adapter: Adapter, model: ModelPlan) -> Tensor:
    """What is added to the weight [o, i] of the layer: alpha / rank * B A, zero in other parts of a fused one."""
    assert model.lora is not None
    product = model.lora.alpha / model.lora.rank * (b @ a)
    if adapter.part is None:
        return product
    share = model.num_attention_heads // model.num_kv_heads
    first, heads = {"query": (0, share), "key": (share, 1), "value": (share + 1, 1)}[adapter.part]
    rows = torch.zeros(model.num_kv_heads, share + 2, model.head_size, a.shape[1])
    rows[:, first : first + heads] = product.view(model.num_kv_heads, heads, model.head_size, -1)
    return rows.flatten(0, 2)


def _read(reader: SafeReader, name: str) -> Tensor:
    return read_tensors(reader, [f"{name}/{MASTER}"])[f"{name}/{MASTER}"]
