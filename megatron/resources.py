"""Open what a configuration names: the tokenizer and the data; check that a checkpoint holds the same model.

Shared by training, generation and evaluation.
"""

from collections.abc import Mapping, Set
from dataclasses import asdict, replace
from pathlib import Path

from megatron.checkpoint.store import checkpoint_config
from megatron.config.load import config_from_flat
from megatron.config.parameter_shapes import Adapter, adapters_of
from megatron.config.plan import ModelPlan
from megatron.config.resolve import resolve
from megatron.config.schema.config import Config, group_of_key
from megatron.config.schema.data_keys import DataKeys
from megatron.data.build import PARTS, Mixture, Part, Sources, build_sources
from megatron.errors import UserError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer

# Fields of the plan that change what the weights compute without changing their shapes, and the keys they come from.
BEHAVIOR_KEYS = {
    "num_layers": "num_layers",
    "tied_embeddings": "tying of the embeddings (no_weight_tying false)",
    "bias_in_dense": "use_bias_in_attn_linear",
    "bias_in_query_key_value": "use_bias_in_qkv",
    "bias_in_mlp": "use_bias_in_mlp",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "position_embedding": "pos_emb",
    "rotary_fraction": "rotary_pct",
    "rotary_base": "rotary_emb_base",
    "rotary_interleaved": "rotary_interleaved",
    "rotary_base_local": "rotary_emb_base_local",
    "layers_without_rotary": "the layers without rotary positions (no_rope_layer_interval)",
    "rope_scaling": "rope_scaling",
    "position_offset": "position_offset",
    "embedding_norm": "embedding_norm",
    "embedding_multiplier": "embedding_multiplier",
    "head_bias": "head_bias",
    "logit_multiplier": "logit_multiplier",
    "logit_softcap": "final_logit_softcapping",
    "relative_distance": "rpe_max_distance",
    "norm": "norm",
    "norm_epsilon": "the norm's epsilon",
    "norm_bias": "norm_bias",
    "norm_placement": "norm_placement",
    "qk_norm": "qk_norm",
    "residual_multiplier": "residual_multiplier",
    "activation": "activation",
    "parallel_residual": "gpt_j_residual",
    "tied_norm": "gpt_j_tied",
    "local_layers": "attention_config",
    "sliding_window": "sliding_window_width",
    "attention_scale": "attention_scale",
    "attention_softcap": "attn_logit_softcapping",
    "clip_qkv": "clip_qkv",
    "lora": "lora (rank, alpha, targets)",
}

# Fields that have no effect without rotary positions.
ROTARY = {
    "rotary_fraction",
    "rotary_base",
    "rotary_interleaved",
    "rotary_base_local",
    "layers_without_rotary",
    "rope_scaling",
}

# The groups of keys that the model depends on.
BEHAVIOR_GROUPS = frozenset({"model", "parallelism", "data", "tuning"})


def open_tokenizer(config: Config) -> Tokenizer:
    """The configured tokenizer. Raises UserError."""
    keys = config.tokenizer
    return build_tokenizer(keys.tokenizer_type, keys.vocab_file, keys.merge_file, keys.end_of_document_token)


def open_data(config: Config, vocab_size: int) -> Sources:
    """The configured data, by split. Raises UserError."""
    keys = config.data
    return build_sources(
        data_path=keys.data_path,
        data_impl=keys.data_impl,
        split=keys.split,
        mixtures={part: mixture for part in PARTS if (mixture := _mixture(keys, part)) is not None},
        seq_length=config.model.seq_length,
        seed=config.training.seed,
        vocab_size=vocab_size,
        pack_impl=keys.pack_impl,
        allow_chopped=keys.allow_chopped,
    )


def _mixture(keys: DataKeys, part: Part) -> Mixture | None:
    """The blend that `PART_data_paths` names; None if it is not set."""
    paths = getattr(keys, f"{part}_data_paths")
    if paths is None:
        return None
    alpha = keys.weighted_sampler_alpha if keys.weight_by_num_documents else None
    weights, labels = getattr(keys, f"{part}_data_weights"), getattr(keys, f"{part}_label_data_paths")
    return Mixture(paths, weights, labels, alpha)


def check_same_model(model: ModelPlan, checkpoint: Path) -> None:
    """Compare settings that change what the weights compute but not their shapes.

    Raises UserError with each setting in which `model` differs from that of the run that wrote `checkpoint`.
    """
    config = written_config(checkpoint_config(checkpoint), str(checkpoint / "config.json"))
    # other numbers of ids are found with the shapes of the weights
    ids = min(model.vocab_size, config.model.vocab_size or model.vocab_size)
    written = resolve(config, config.parallelism.model_parallel_size, ids, inference=True).model
    if written.lora is None:  # adapters are put on it
        model = replace(model, lora=None)
    elif model.lora is not None and _adapters(model) == _adapters(written):  # the same ones, by other patterns
        model = replace(model, lora=replace(model.lora, targets=written.lora.targets))
    here, there = _behavior(model), _behavior(written)
    differing = [
        f"  {key} is {here[field]} here, and was {there[field]} there"
        for field, key in BEHAVIOR_KEYS.items()
        if here[field] != there[field]
    ]
    if differing:
        raise UserError(
            f"{checkpoint} holds another model than the configuration describes:",
            *differing,
            "to load its weights nevertheless: allow_changes=[model]",
        )


def written_config(flat: Mapping[str, object], source: str, groups: Set[str] = BEHAVIOR_GROUPS) -> Config:
    """The part of a checkpoint's configuration that determines the model, or other `groups` of keys.

    Its plugins are left out: no module is imported because a checkpoint names it. source: for messages.
    Raises ConfigError, for keys that this version does not know as well.
    """
    group_of = group_of_key() | {"plugins": ""}
    chosen = {key: value for key, value in flat.items() if group_of.get(key, "model") in groups}
    return config_from_flat(chosen, source)


def _adapters(model: ModelPlan) -> list[list[Adapter]]:
    return [adapters_of(model, layer) for layer in range(model.num_layers)]


def _behavior(model: ModelPlan) -> dict[str, object]:
    """The plan without what does not change the model: the choice of kernels, and settings that are not used."""
    local = [layer for layer, kind in enumerate(model.attention_kinds) if kind == "local"]
    unused = set() if model.position_embedding == "rotary" else ROTARY
    unused = unused | (set() if model.position_embedding == "learned" else {"position_offset"})
    unused = unused | (set() if local else {"sliding_window", "rotary_base_local"})
    unused = unused | (set() if model.position_embedding == "rpe" else {"relative_distance"})
    scale = model.attention_scale or model.head_size**-0.5
    lora = model.lora and (model.lora.rank, model.lora.alpha, model.lora.targets)
    computed = {"local_layers": local, "attention_scale": scale, "lora": lora}
    return asdict(model) | computed | dict.fromkeys(unused)
