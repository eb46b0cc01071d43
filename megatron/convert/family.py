"""A family: one architecture of Hugging Face, as a table of its settings and its parameters.

    family = family_of(config)             # config.json as a dictionary
    model = family.model(config)           # ModelPlan
    keys = model_keys(model)               # our configuration
    parameters = family.parameters(model)  # ParameterMap: tensors in both directions
    config = family.config(model)          # config.json for a model of ours

A family adds nothing to the model: every setting it needs is a key. What it does not know is refused by name, in both
directions. transformers' own configuration classes read a config.json, so that defaults and older spellings are theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron import registry
from megatron.config.plan import ModelPlan
from megatron.convert.fields import ALWAYS_IGNORED, Field, Values, read_fields, write_fields
from megatron.convert.parameters import (
    Entry,
    Module,
    ParameterMap,
    same,
    tensors_around_the_blocks,
    tensors_of_a_block,
)
from megatron.errors import UserError

KIND = "hugging_face_family"
# Fields of ModelPlan of which a configuration of theirs says nothing, and which do not change what weights compute.
TRAINING = {
    "init_method": "normal",
    "output_init_method": "scaled_normal",
    "init_std": 0.02,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "neftune_noise_alpha": None,
    "reset_attention_mask": False,
    "reset_position_ids": False,
    "float8": False,
    "lora": None,
}
# The usual values of fields that have no default in ModelPlan.
USUAL = {
    "rotary_fraction": 1.0,
    "rotary_base": 10000.0,
    "parallel_residual": False,
    "tied_norm": False,
    "sliding_window": None,
}
# What transformers reads from a configuration whose class does not declare it.
READ_UNDECLARED = ("head_dim", "quantization_config", "use_bidirectional_attention")
# What is read of a config.json elsewhere: by us, or by transformers, which moves it to other fields.
ELSEWHERE = {
    *("model_type", "bos_token_id", "eos_token_id", "pad_token_id", "text_config"),
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "rotary_pct", "rotary_emb_base"),
    "sliding_window_pattern",
}
ROTARY_ONLY = {
    "rotary_fraction": 1.0,
    "rotary_base": 10000.0,
    "rotary_interleaved": False,
    "rotary_base_local": None,
    "layers_without_rotary": (),
    "rope_scaling": None,
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    name: as people call it. model_type and architecture: in its config.json. fields: its configuration (see fields.py).
    fixed: fields of ModelPlan that are always so. prefix: of all parameter names but the head's. modules: our modules
    outside the blocks -> theirs; layers: the list of their blocks; block: our modules in a block -> theirs. A string is
    the same module under another name. ignored: ends of tensor names without content of their own.
    in_files: the names that files have for parameters that transformers names otherwise in memory.
    """

    name: str
    model_type: str
    architecture: str
    fields: Mapping[str, Field]
    fixed: Mapping[str, Any]
    prefix: str
    modules: Mapping[str, str | Module]
    layers: str
    block: Mapping[str, str | Module]
    ignored: tuple[str, ...] = field(default=())
    in_files: Mapping[str, str] = field(default_factory=dict)

    def like(
        self,
        name: str,
        model_type: str,
        architecture: str,
        *,
        fields: Mapping[str, Field] | None = None,
        fixed: Mapping[str, Any] | None = None,
        modules: Mapping[str, str | Module] | None = None,
        block: Mapping[str, str | Module] | None = None,
        without: Sequence[str] = (),
    ) -> "Family":
        """Another family that differs from this one in these entries of its tables, and lacks those in `without`."""

        def joined(table: Mapping[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
            return {key: value for key, value in {**table, **(changes or {})}.items() if key not in without}

        return replace(
            self,
            name=name,
            model_type=model_type,
            architecture=architecture,
            fields=joined(self.fields, fields),
            fixed=joined(self.fixed, fixed),
            modules=joined(self.modules, modules),
            block=joined(self.block, block),
        )

    def model(self, config: Values) -> ModelPlan:
        """The model that a config.json describes, without padding of the vocabulary and without dropout.

        Raises UserError with every field that we cannot hold or do not know.
        """
        from transformers import CONFIG_MAPPING

        kind = CONFIG_MAPPING[self.model_type]
        try:
            values = kind.from_dict(dict(config)).to_dict()
        except Exception as error:  # of many kinds, for values that their class refuses
            raise UserError(f"config.json of {self.name}: {error}") from error
        problems = _unknown_fields(self, values, kind().to_dict())
        try:
            ours = read_fields(self.fields, values)
        except UserError as error:
            problems += error.problems
        if problems:
            raise UserError(*(f"config.json of {self.name}: {problem}" for problem in problems))
        values = {**TRAINING, **USUAL, **self.fixed, **ours}
        values.setdefault("num_kv_heads", values["num_attention_heads"])
        values.setdefault("head_size", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("attention_kinds", ("global",) * values["num_layers"])
        return ModelPlan(padded_vocab_size=values["vocab_size"], **values)

    def unused_fields(self, config: Values) -> list[str]:
        """The names in a valid config.json that change nothing here: neither we nor transformers' class read them."""
        from transformers import CONFIG_MAPPING

        kind = CONFIG_MAPPING[self.model_type]
        values = _Recorded(kind.from_dict(dict(config)).to_dict())
        read_fields(self.fields, values)
        used = {*values.read, *ELSEWHERE, *READ_UNDECLARED}
        return sorted(name for name in config if kind.attribute_map.get(name, name) not in used)

    def config(self, model: ModelPlan) -> dict[str, Any]:
        """The config.json of a model. Raises UserError with every setting that the architecture cannot hold."""
        try:
            config = write_fields(self.fields, model)
            back = self.model(config)
        except UserError as error:
            raise UserError(
                *(f"{self.name} cannot hold this model: {problem}" for problem in error.problems)
            ) from error
        here, there = (what_computes(plan) for plan in (model, back))
        problems = [
            f"{self.name} cannot hold this model: {name} would be {there[name]!r}, not {here[name]!r}"
            for name in here
            if here[name] != there[name]
        ]
        if problems:
            raise UserError(*problems)
        return {"model_type": self.model_type, "architectures": [self.architecture], **config}

    def parameters(self, model: ModelPlan) -> ParameterMap:
        """The map of all parameters. Raises UserError for modules that the architecture does not have."""
        around, inside = tensors_around_the_blocks(model), tensors_of_a_block(model)
        missing = [name for name in around if name not in self.modules]
        missing += [name for name in inside if name not in self.block and not _fused(name, self.block)]
        if missing:
            raise UserError(*(f"{self.name} has no {name}" for name in missing))
        entries = _entries(around, self.modules, "", "", model)
        for layer in range(model.num_layers):
            entries += _entries(inside, self.block, f"blocks.{layer}.", f"{self.layers}.{layer}.", model)
        head = self.modules.get("head")
        tied = (f"{_module(head).theirs}.weight",) if head is not None and model.tied_embeddings else ()
        return ParameterMap(entries, self.prefix, self.ignored + tied, self.in_files)


def family_of(config: Values) -> Family:
    """The family of a config.json. Raises UserError, with the nearest name, if we have no table for its model_type."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"config.json has no model_type; known: {', '.join(registry.names(KIND))}")
    family: Family = registry.resolve(KIND, kind)
    return family


def families_for(model: ModelPlan) -> list[Family]:
    """The families that can hold a model, in the order of the registry."""
    found = []
    for name in registry.names(KIND):
        family: Family = registry.resolve(KIND, name)
        try:
            family.config(model)
        except UserError:
            continue
        found.append(family)
    return found


class _Recorded(dict[str, Any]):
    """Fields of which it is recorded which are read."""

    def __init__(self, values: Values) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def _unknown_fields(family: Family, values: Values, defaults: Values) -> list[str]:
    """A message for each field that may change what is computed.

    A published config.json has fields of other programs and other versions as well. What transformers' class does not
    declare changes nothing there, but for the few fields that it reads where they are.
    """
    known = ALWAYS_IGNORED | set(family.fields)
    problems = [
        f"{name} {values[name]!r} is not known here, and not at its default ({default!r})"
        for name, default in defaults.items()
        if name not in known and values[name] != default
    ]
    return problems + [
        f"{name} {values[name]!r} is not known here"
        for name in READ_UNDECLARED
        if name not in {*known, *defaults} and values.get(name) and not _usual_head(name, values)
    ]


def _usual_head(name: str, values: Values) -> bool:
    heads, size = values.get("num_attention_heads", 1), values.get("hidden_size", 0)
    return name == "head_dim" and bool(values["head_dim"] * heads == size)


def what_computes(model: ModelPlan) -> dict[str, Any]:
    """The fields of a model that change what its weights compute; those without an effect at their usual values."""
    values = asdict(model) | TRAINING | {"padded_vocab_size": model.vocab_size}
    values["attention_kinds"] = tuple("local" if kind == "local" else "global" for kind in model.attention_kinds)
    values["rotary_fraction"] = int(model.head_size * model.rotary_fraction) / model.head_size
    if model.position_embedding != "rotary":
        values |= ROTARY_ONLY
    if model.position_embedding != "learned":
        values["position_offset"] = 0
    if model.position_embedding != "rpe":
        values |= {"relative_buckets": 32, "relative_distance": 128}
    if "local" not in model.attention_kinds:
        values |= {"sliding_window": None, "rotary_base_local": None}
    if model.norm != "layernorm":
        values["norm_bias"] = True
    if model.attention_scale == model.head_size**-0.5:
        values["attention_scale"] = None
    return values


def _module(entry: str | Module) -> Module:
    return same(entry) if isinstance(entry, str) else entry


def _fused(name: str, table: Mapping[str, str | Module]) -> bool:
    return any(name in ours.split("+") for ours in table if "+" in ours)


def _entries(
    present: Mapping[str, tuple[str, ...]],
    table: Mapping[str, str | Module],
    ours: str,
    theirs: str,
    model: ModelPlan,
) -> list[Entry]:
    """The entries of the modules that a model has."""
    entries = []
    for name, module in table.items():
        parts = name.split("+")
        if parts[0] in present:
            whole = _module(module)
            mine = "+".join(ours + part for part in parts)
            entries += [whole.entry(mine, theirs + whole.theirs, kind, model) for kind in present[parts[0]]]
    return entries
