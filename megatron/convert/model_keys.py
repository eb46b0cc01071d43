"""The configuration keys of a model: the inverse of `megatron.config.resolve` for its `ModelPlan`."""

from typing import Any

from megatron.config.plan import ModelPlan
from megatron.config.schema.model_keys import ModelKeys
from megatron.convert.fields import write_scaling
from megatron.errors import UserError

# Our keys with the same value as a field of the plan; others are computed below.
SAME = {
    "vocab_size": "vocab_size",
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_kv_heads",
    "head_dim": "head_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "seq_length": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "norm": "norm",
    "norm_bias": "norm_bias",
    "norm_placement": "norm_placement",
    "embedding_norm": "embedding_norm",
    "qk_norm": "qk_norm",
    "pos_emb": "position_embedding",
    "position_offset": "position_offset",
    "rpe_num_buckets": "relative_buckets",
    "rpe_max_distance": "relative_distance",
    "rotary_pct": "rotary_fraction",
    "rotary_emb_base": "rotary_base",
    "rotary_interleaved": "rotary_interleaved",
    "rotary_emb_base_local": "rotary_base_local",
    "head_bias": "head_bias",
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "logit_multiplier": "logit_multiplier",
    "final_logit_softcapping": "logit_softcap",
    "activation": "activation",
    "gpt_j_residual": "parallel_residual",
    "gpt_j_tied": "tied_norm",
    "use_bias_in_attn_linear": "bias_in_dense",
    "use_bias_in_qkv": "bias_in_query_key_value",
    "use_bias_in_mlp": "bias_in_mlp",
    "init_method": "init_method",
    "output_layer_init_method": "output_init_method",
    "init_method_std": "init_std",
    "attention_scale": "attention_scale",
    "attn_logit_softcapping": "attention_softcap",
    "clip_qkv": "clip_qkv",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "sliding_window_width": "sliding_window",
}
NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length")
ALWAYS = (*NEEDED, "vocab_size", "max_position_embeddings", "norm", "pos_emb", "activation", "no_weight_tying")
EPSILONS = {"layernorm": "layernorm_epsilon", "rmsnorm": "rms_norm_epsilon", "rmsnorm_1p": "rms_norm_epsilon"}


def model_keys(model: ModelPlan) -> dict[str, Any]:
    """The keys of `model`, without those at their defaults and without the padding of the vocabulary.

    Raises UserError for layers without rotary positions that are not every n-th one.
    """
    keys = {key: getattr(model, name) for key, name in SAME.items()}
    keys["no_weight_tying"] = not model.tied_embeddings
    if model.norm in EPSILONS:
        keys[EPSILONS[model.norm]] = model.norm_epsilon
    if model.rope_scaling is not None:
        keys["rope_scaling"] = write_scaling(model.rope_scaling)
    if set(model.attention_kinds) != {"global"}:
        keys["attention_config"] = attention_config(model.attention_kinds)
    if model.layers_without_rotary:
        keys["no_rope_layer_interval"] = _interval(model)
    usual = {"num_kv_heads": model.num_attention_heads, "use_bias_in_qkv": model.bias_in_dense}
    if model.hidden_size % model.num_attention_heads == 0:
        usual["head_dim"] = model.hidden_size // model.num_attention_heads
    defaults = {name: field.default for name, field in ModelKeys.model_fields.items()} | usual
    return {key: value for key, value in keys.items() if key in ALWAYS or value != defaults[key]}


def attention_config(kinds: tuple[str, ...]) -> list[list[Any]]:
    """The shortest pattern that gives these kinds of attention."""
    count = len(kinds)
    period = next(p for p in range(1, count + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))
    pattern: list[list[Any]] = [[list(kinds[:period]), count // period]]
    return pattern + ([[list(kinds[: count % period]), 1]] if count % period else [])


def _interval(model: ModelPlan) -> int:
    interval = model.layers_without_rotary[0] + 1
    if model.layers_without_rotary != tuple(range(interval - 1, model.num_layers, interval)):
        without = ", ".join(map(str, model.layers_without_rotary))
        raise UserError(f"layers {without} have no rotary positions, which no no_rope_layer_interval gives")
    return interval
