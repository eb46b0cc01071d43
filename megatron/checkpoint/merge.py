"""Low-rank adapters merged into the weights of their base: those of a whole model."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from megatron.checkpoint.converted import StoredWeight
from megatron.config.parameter_shapes import Adapter, adapters_of, is_adapter
from megatron.config.plan import ModelPlan


def merged_weights(
    base: Mapping[str, StoredWeight], adapters: Mapping[str, StoredWeight], model: ModelPlan
) -> dict[str, StoredWeight]:
    """The weights of the base, with W + alpha / rank * B A for W; what they are made of is read when they are.

    base and adapters: by global name; each may have more. model: with adapters.
    """
    found: dict[str, list[Adapter]] = {}
    for layer in range(model.num_layers):
        for each in adapters_of(model, layer):
            found.setdefault(f"blocks.{layer}.{each.layer}.weight", []).append(each)

    def read(name: str) -> Tensor:
        whole = base[name].read().float()
        for each in found.get(name, []):
            prefix = name.partition(each.layer)[0] + each.name
            a, b = (adapters[f"{prefix}.{kind}"].read().float() for kind in "ab")
            whole = whole + adapter_weight(a, b, each, model)
        return whole

    return {
        name: StoredWeight(weight.shape, partial(read, name)) for name, weight in base.items() if not is_adapter(name)
    }


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
