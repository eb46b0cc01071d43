"""The fields of a Hugging Face configuration and those of our `ModelPlan`: one table for both directions.

A table maps each field of theirs to what it means here: the name of a field of `ModelPlan` with the same value, the
names of several, or one of the classes below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.config.plan import ModelPlan, RopeScaling
from megatron.errors import UserError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """A field of theirs with names of its own for our values; several of theirs may mean the same."""

    ours: str
    names: Mapping[Any, Any]  # their value -> ours


@dataclass(frozen=True)
class Required:
    """A field of theirs that must have one of these values, the first of which an export has."""

    values: Sequence[Any]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class Computed:
    """Fields of ours that are computed from theirs, with the inverse for this field of theirs.

    read: from all fields of theirs. May raise UserError. write: the value of this field.
    """

    read: Callable[[Values], dict[str, Any]]
    write: Callable[[ModelPlan], Any]


@dataclass(frozen=True)
class Written:
    """A field of theirs that changes nothing here, such as a dropout of training; an export has this value."""

    write: Callable[[ModelPlan], Any]


class Ignored:
    """A field of theirs that changes nothing that the weights compute, or that another field's entry reads."""


IGNORED = Ignored()
Field = str | tuple[str, ...] | Choice | Required | Computed | Written | Ignored
Fields = dict[str, Field]

# What any configuration may contain without an effect on what the weights compute.
ALWAYS_IGNORED = frozenset(
    (
        "model_type",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "id2label",
        "label2id",
        "problem_type",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "is_decoder",
        "task_specific_params",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "tokenizer_class",
        "use_cache",
        "auto_map",
        "_attn_implementation",
        "attn_implementation",
        "gradient_checkpointing",
        "initializer_range",
        "pretraining_tp",
        "classifier_dropout",
    )
)


def read_fields(table: Mapping[str, Field], config: Values) -> dict[str, Any]:
    """Fields of `ModelPlan` from a whole configuration of theirs. Raises UserError with all values we cannot hold."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, field in table.items():
        try:
            if isinstance(field, str):
                values[field] = config[name]
            elif isinstance(field, tuple):
                values |= dict.fromkeys(field, config[name])
            elif isinstance(field, Choice):
                values[field.ours] = _our_name(name, config[name], field.names)
            elif isinstance(field, Computed):
                values |= field.read(config)
            elif isinstance(field, Required) and config.get(name, field.values[0]) not in field.values:
                problems.append(f"{name} must be {_listed(field.values)} here, not {config[name]!r}")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return values


def write_fields(table: Mapping[str, Field], model: ModelPlan) -> dict[str, Any]:
    """A configuration of theirs. Raises UserError with all values that it has no name for."""
    config: dict[str, Any] = {}
    problems: list[str] = []
    for name, field in table.items():
        if isinstance(field, str):
            config[name] = getattr(model, field)
        elif isinstance(field, tuple):
            config[name] = getattr(model, field[0])
        elif isinstance(field, Required):
            config[name] = field.values[0]
        elif isinstance(field, Computed | Written):
            config[name] = field.write(model)
        elif isinstance(field, Choice):
            theirs = [key for key, ours in field.names.items() if ours == getattr(model, field.ours)]
            if theirs:
                config[name] = theirs[0]
            else:
                known = _listed(dict.fromkeys(field.names.values()))
                problems.append(f"{field.ours} must be {known}, not {getattr(model, field.ours)!r}")
    if problems:
        raise UserError(*problems)
    return config


def _our_name(name: str, value: Any, names: Mapping[Any, Any]) -> Any:
    if value not in names:
        raise UserError(f"{name} {value!r} has no counterpart here; known: {', '.join(map(str, names))}")
    return names[value]


def _listed(values: Any) -> str:
    return " or ".join(map(repr, values))


# Kinds of rope scaling, with the names in their rope_parameters and in RopeScaling.
_SCALED = {"factor": "factor", "original_max_position_embeddings": "original_positions"}
ROPE_SCALING: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "dynamic": _SCALED,
    "yarn": _SCALED
    | {name: name for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")},
    "llama3": _SCALED | {"low_freq_factor": "low_frequency", "high_freq_factor": "high_frequency"},
    "longrope": _SCALED
    | {"attention_factor": "attention_factor", "short_factor": "short_factors", "long_factor": "long_factors"},
}
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
PLAIN = {**GELU, "relu": "relu", "silu": "silu", "swish": "silu"}
GATED = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}


def rotary(*, partial: bool = False) -> Computed:
    """`rope_parameters`: base, scaling and, where the architecture has it, the part of each head that is rotated."""

    def read(config: Values) -> dict[str, Any]:
        rope = config["rope_parameters"]
        share = rope.get("partial_rotary_factor", 1.0)
        if share != 1.0 and not partial:
            raise UserError(f"rope_parameters.partial_rotary_factor must be 1.0 here, not {share!r}")
        values = {"position_embedding": "rotary", "rotary_base": float(rope["rope_theta"])}
        scaling = read_scaling(rope, config["max_position_embeddings"])
        return values | {"rotary_fraction": share, "rope_scaling": scaling}

    def write(model: ModelPlan) -> dict[str, Any]:
        share = {"partial_rotary_factor": model.rotary_fraction} if partial else {}
        rope = {"rope_theta": model.rotary_base} | share | write_scaling(model.rope_scaling)
        if rope["rope_type"] == "dynamic":
            original = rope.pop("original_max_position_embeddings")
            if original != model.max_position_embeddings:
                raise UserError(
                    f"rope_scaling (dynamic) has original_max_position_embeddings {original}, which in a config.json "
                    f"is max_position_embeddings, not {model.max_position_embeddings}"
                )
        return rope

    return Computed(read, write)


def read_scaling(rope: Values, positions: int) -> RopeScaling | None:
    """From their `rope_parameters` and `max_position_embeddings`. Raises UserError for an unknown kind."""
    kind = rope.get("rope_type", "default")
    names = ROPE_SCALING.get(kind)
    if names is None:
        raise UserError(f"rope_type {kind!r} has no counterpart here; known: {', '.join(ROPE_SCALING)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *names}
    if unknown := [name for name, value in rope.items() if name not in known and value is not None]:
        raise UserError(f"rope_parameters of rope_type {kind!r}: {', '.join(unknown)} has no counterpart here")
    if kind == "default":
        return None
    # theirs begin to scale at the positions that the configuration allows (dynamic), or are scaled to those
    original = rope.get("original_max_position_embeddings") if kind != "dynamic" else positions
    values: dict[str, Any] = dict(rope) | {"original_max_position_embeddings": original}
    if values.get("factor") is None and original:
        values["factor"] = positions / original
    given: dict[str, Any] = {ours: values[theirs] for theirs, ours in names.items() if values.get(theirs) is not None}
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    return RopeScaling(kind, **(given | lists))


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `read_scaling`; the names are those of our key `rope_scaling` as well."""
    if scaling is None:
        return {"rope_type": "default"}
    values = {theirs: getattr(scaling, ours) for theirs, ours in ROPE_SCALING[scaling.kind].items()}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"rope_type": scaling.kind} | {name: value for name, value in lists.items() if value is not None}


def layer_types(config_name: str = "layer_types") -> Computed:
    """A list with the kind of attention of each layer; its window is the field `sliding_window`."""
    names = {"full_attention": "global", "sliding_attention": "local"}

    def read(config: Values) -> dict[str, Any]:
        kinds = tuple(_our_name(config_name, kind, names) for kind in config[config_name])
        return {"attention_kinds": kinds, "sliding_window": config["sliding_window"] if "local" in kinds else None}

    return Computed(
        read,
        lambda model: ["sliding_attention" if kind == "local" else "full_attention" for kind in model.attention_kinds],
    )


def one_window(config: Values) -> dict[str, Any]:
    """`sliding_window` of all layers, or None."""
    window = config["sliding_window"]
    return {
        "attention_kinds": ("local" if window else "global",) * config["num_hidden_layers"],
        "sliding_window": window,
    }


def dropouts(attention: str, *hidden: str) -> Fields:
    """Their dropouts of attention probabilities, and of hidden states."""
    return {
        attention: Written(lambda model: model.attention_dropout),
        **{name: Written(lambda model: model.hidden_dropout) for name in hidden},
    }


def four_times(theirs: str, hidden_size: str) -> Computed:
    """The width of the feed-forward layer; None is four times the hidden size."""
    return Computed(
        lambda config: {"ffn_hidden_size": config[theirs] or 4 * config[hidden_size]},
        lambda model: model.ffn_hidden_size,
    )


def exact(written: float, computed: Callable[[float], float], value: float) -> float:
    """`written`, rounded to few digits if `computed` of that is `value` all the same; a whole number as int."""
    rounded = (round(written, digits) for digits in range(12))
    short = next((number for number in rounded if number and computed(number) == value), written)
    return int(short) if short == int(short) else short


def share_of(part: int, whole: int) -> float:
    """The fraction of `whole` that gives `part` when rounded down."""
    share = part / whole
    return share if int(whole * share) == part else math.nextafter(share, 1)


# The names that most architectures give to sizes.
SIZES: Fields = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings",
}
SCALED_EMBEDDING: Fields = {
    "hidden_size": Computed(
        lambda config: {
            "hidden_size": config["hidden_size"],
            "embedding_multiplier": math.sqrt(config["hidden_size"]),
        },
        lambda model: model.hidden_size,
    )
}
SCORE_SCALE = Computed(  # 1 / sqrt(query_pre_attn_scalar)
    lambda config: {
        "attention_scale": None
        if config["query_pre_attn_scalar"] == config["head_dim"]
        else config["query_pre_attn_scalar"] ** -0.5
    },
    lambda model: (
        model.head_size
        if model.attention_scale is None
        else exact(model.attention_scale**-2, lambda x: x**-0.5, model.attention_scale)
    ),
)
