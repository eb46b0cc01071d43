"""Map the parameters of one of our models to those of a Hugging Face model: one table for both directions.

Our names are global names; tensors are unsharded and without vocabulary padding. Entries only move elements, so a round
trip is bit exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.errors import UserError


@dataclass(frozen=True)
class Entry:
    """One of our parameters, and their parameters with the same elements."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor]  # theirs -> ours
    split: Callable[[Tensor], Sequence[Tensor]]  # ours -> theirs


def same(ours: str, theirs: str) -> Entry:
    """The same tensor under another name."""
    return Entry(ours, (theirs,), lambda tensors: tensors[0], lambda tensor: (tensor,))


def transposed(ours: str, theirs: str) -> Entry:
    """A weight that they store as [inputs, outputs]."""
    return Entry(ours, (theirs,), lambda tensors: tensors[0].t(), lambda tensor: (tensor.t(),))


def separate_heads(ours: str, theirs: tuple[str, str, str], model: ModelPlan) -> Entry:
    """Theirs: query, key and value as three tensors, each with its heads in order along the first dimension.

    Ours: fused, grouped by key/value head: its query heads, its key, its value.
    """
    groups, size = model.num_kv_heads, model.head_size
    share = model.num_attention_heads // groups

    def join(tensors: Sequence[Tensor]) -> Tensor:
        grouped = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> Sequence[Tensor]:
        grouped = tensor.reshape(groups, (share + 2) * size, *tensor.shape[1:])
        return [part.flatten(0, 1) for part in grouped.split([share * size, size, size], dim=1)]

    return Entry(ours, theirs, join, split)


def weight_and_bias(make: Callable[[str, str], Entry], ours: str, theirs: str, bias: bool) -> list[Entry]:
    """Entries for a weight, made by `make`, and with `bias` for its bias, which needs no conversion."""
    weight = make(f"{ours}.weight", f"{theirs}.weight")
    return [weight, same(f"{ours}.bias", f"{theirs}.bias")] if bias else [weight]


@dataclass(frozen=True)
class ParameterMap:
    """The entries for all parameters of a model."""

    entries: Sequence[Entry]
    ignored: tuple[str, ...] = ()  # suffixes of their names without content of their own, such as buffers

    def from_hugging_face(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their parameters -> ours.

        Raises UserError for missing names and for names without a counterpart: no weight is dropped silently.
        """
        required = {name for entry in self.entries for name in entry.theirs}
        unknown = [name for name in state if name not in required and not name.endswith(self.ignored)]
        problems = [f"{name}: not in the Hugging Face model" for name in sorted(required - set(state))]
        problems += [f"{name}: has no counterpart in our model" for name in sorted(unknown)]
        if problems:
            raise UserError(*problems)
        return {e.ours: e.join([state[name] for name in e.theirs]).contiguous() for e in self.entries}

    def to_hugging_face(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our parameters -> theirs. Raises UserError if a name is missing or unknown."""
        different = {entry.ours for entry in self.entries} ^ set(state)
        if different:
            raise UserError(f"missing in the model or in its map to Hugging Face: {', '.join(sorted(different))}")
        return {
            name: part.contiguous()
            for entry in self.entries
            for name, part in zip(entry.theirs, entry.split(state[entry.ours]), strict=True)
        }


def require(model: ModelPlan, architecture: str, **allowed: Sequence[object]) -> None:
    """Raise UserError naming each field of `model` whose value is not among those that the architecture supports.

    Fields that few architectures have (`qk_norm`, `norm_placement`) are optional; their defaults are required then.
    """
    usual: dict[str, Sequence[object]] = {"qk_norm": [None], "norm_placement": ["input"]}
    problems = [
        f"{architecture} has no {field} {getattr(model, field)!r}; it knows {', '.join(map(repr, values))}"
        for field, values in (usual | allowed).items()
        if getattr(model, field) not in values
    ]
    if "local" in model.attention_kinds:
        problems.append(f"{architecture} has no local attention")
    if problems:
        raise UserError(*problems)


_ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def named_as(table: Mapping[str, str], value: str, key: str) -> str:
    """Our name for their `value` of `key`. Raises UserError if there is none."""
    if value not in table:
        raise UserError(f"{key} {value!r} has no counterpart here; known: {', '.join(table)}")
    return table[value]


def rotary_keys(config: Any) -> dict[str, Any]:
    """Our configuration keys for a transformers configuration with rotary positions.

    Raises UserError for unsupported rope types (yarn, dynamic, ...).
    """
    rope = config.rope_parameters
    keys = {
        "pos_emb": "rotary",
        "rotary_pct": rope.get("partial_rotary_factor", 1.0),
        "rotary_emb_base": rope["rope_theta"],
    }
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise UserError(f"rope_type {kind!r} has no counterpart here; known: {', '.join(_ROPE_TYPES)}")
    return keys | {"rope_scaling": {"rope_type": kind} | {name: rope[name] for name in _ROPE_TYPES[kind]}}
