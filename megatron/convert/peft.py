"""Low-rank adapters in the format of PEFT (https://github.com/huggingface/peft), in both directions.

Our A [r, i] and B [o, r] of a layer become their lora_A.weight and lora_B.weight, of the same shapes; the rows of B are
ordered as those of the weight. Where their queries, keys and values are layers of their own, so are our adapters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.config.parameter_shapes import Adapter, adapters_of
from megatron.config.plan import LoraPlan, ModelPlan
from megatron.convert.family import Family
from megatron.convert.parameters import Entry
from megatron.errors import UserError

PREFIX = "base_model.model."
PARTS = ("query", "key", "value")
# Fields of adapter_config.json that change nothing that adapters compute, or that are read here.
_READ = {"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "init_lora_weights"}
_IGNORED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "target_modules", "peft_version"}
_IGNORED |= {
    "megatron_core",
    "layers_to_transform",
    "layers_pattern",
    "runtime_config",
    "exclude_modules",
    "qalora_group_size",
}


def to_peft(
    adapters: Mapping[str, Tensor], model: ModelPlan, family: Family
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors, from our adapters by global name.

    Raises UserError for adapters that the layers of `family` cannot have.
    """
    assert model.lora is not None
    entries, tensors, turned = _entries(model, family), dict[str, Tensor](), False
    for layer, each in _all_adapters(model):
        name, entry = f"blocks.{layer}.{each.name}", entries[f"blocks.{layer}.{each.layer}.weight"]
        a, b = adapters[f"{name}.a"], adapters[f"{name}.b"]
        for their_name, part in _their_layers(entry, each, family):
            rows = b if each.part is not None or len(entry.theirs) == 1 else entry.split([b])[part]
            if each.part is None and len(entry.theirs) == 1:
                rows, turned = _split(entry, b)
            tensors[f"{PREFIX}{their_name}.lora_A.weight"] = a.clone()  # three layers may share it, and a file may not
            tensors[f"{PREFIX}{their_name}.lora_B.weight"] = rows.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": model.lora.dropout,
        "target_modules": sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}),
        "bias": "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
    }
    return config, tensors


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: ModelPlan, family: Family
) -> tuple[LoraPlan, dict[str, Tensor]]:
    """Our adapters by global name, and the plan that has them, from theirs. model: without adapters.

    Raises UserError for kinds of adapters that we do not have and for layers without a counterpart.
    """
    problems = [
        f"adapter_config.json: {key} {value!r} is not known here"
        for key, value in config.items()
        if key not in _READ | _IGNORED and value
    ]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        problems.append("adapter_config.json: peft_type must be LORA, and bias none")
    by_layer = {name: entry for entry in _entries(model, family).values() for name in entry.theirs}
    ours: dict[str, Tensor] = {}
    for layer in sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}):
        entry = by_layer.get(f"{layer}.weight")
        if entry is None or len(entry.ours) > 1:
            problems.append(f"{layer}: our model has no layer of its own for it")
            continue
        a, b = (tensors[f"{PREFIX}{layer}.lora_{kind}.weight"] for kind in "AB")
        name = entry.ours[0].removesuffix(".weight") + ".lora"
        if len(entry.theirs) > 1:
            name += f".{PARTS[entry.theirs.index(f'{layer}.weight')]}"
        else:
            b = _join(entry, b)
        ours |= {f"{name}.a": a, f"{name}.b": b}
    if problems:
        raise UserError(*problems)
    lora = LoraPlan(config["r"], float(config["lora_alpha"]), config.get("lora_dropout", 0.0), _targets(ours, model))
    wanted = {
        f"blocks.{layer}.{each.name}.{kind}"
        for layer, each in _all_adapters(replace(model, lora=lora))
        for kind in "ab"
    }
    if wanted != set(ours):
        raise UserError(f"the adapters are of several kinds in one layer: {', '.join(sorted(wanted ^ set(ours))[:4])}")
    return lora, ours


def _all_adapters(model: ModelPlan) -> Iterator[tuple[int, Adapter]]:
    for layer in range(model.num_layers):
        for each in adapters_of(model, layer):
            yield layer, each


def _entries(model: ModelPlan, family: Family) -> dict[str, Entry]:
    """The entries of weights, by each of our names."""
    whole = family.parameters(replace(model, lora=None)).entries
    return {name: entry for entry in whole for name in entry.ours if name.endswith(".weight")}


def _their_layers(entry: Entry, adapter: Adapter, family: Family) -> Iterator[tuple[str, int]]:
    """Their layers that an adapter belongs to, and their places in the entry."""
    names = [name.removesuffix(".weight") for name in entry.theirs]
    if len(entry.ours) > 1 or (adapter.part is not None and len(names) == 1):
        what = "query_key_value" if adapter.part else "both"
        raise UserError(
            f"{family.name} has one layer {names[0]} for what {adapter.name} adapts a part of; adapt {what}"
        )
    places = range(len(names)) if adapter.part is None else [PARTS.index(adapter.part)]
    yield from ((names[place], place) for place in places)


def _is_turned(entry: Entry, outputs: int) -> bool:
    """Whether their weight is [inputs, outputs]."""
    return entry.split([torch.empty(outputs, 1)])[0].shape[0] == 1 < outputs


def _split(entry: Entry, b: Tensor) -> tuple[Tensor, bool]:
    turned, (rows,) = _is_turned(entry, len(b)), entry.split([b])
    return (rows.t() if turned else rows), turned


def _join(entry: Entry, b: Tensor) -> Tensor:
    (rows,) = entry.join([b.t() if _is_turned(entry, len(b)) else b])
    return rows.contiguous()


def _targets(ours: Mapping[str, Tensor], model: ModelPlan) -> tuple[str, ...]:
    """Patterns for the layers: the same in all blocks without their number."""
    names: dict[str, set[str]] = {}
    for name in ours:
        blocks, number, *inside, _ = name.split(".")
        module, _, part = ".".join(inside).partition(".lora")
        names.setdefault(f"attention{part}" if part else module, set()).add(f"{blocks}.{number}")
    found: list[str] = []
    for target, layers in names.items():
        everywhere = len(layers) == model.num_layers
        found += [target] if everywhere else [f"{layer}.{target}" for layer in sorted(layers)]
    return tuple(found)
