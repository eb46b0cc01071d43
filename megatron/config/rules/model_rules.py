"""Rules between the keys of the model and of its parallelism."""

from collections.abc import Iterator

from megatron.config.rules.rule import Rule, rule
from megatron.config.schema.config import Config
from megatron.config.widths import (
    attention_names,
    divisors,
    feed_forward_width,
    head_size,
    is_gated,
    neox_gated_width,
    rotary_elements,
    round_up,
    would_work,
)
from megatron.config.yaml_file import show

MODEL_RULES: list[Rule] = []


@rule(MODEL_RULES, "hidden_size", "num_attention_heads", "head_dim")
def _heads_divide_the_width(config: Config) -> Iterator[str]:
    width, heads = config.model.hidden_size, config.model.num_attention_heads
    if width % heads and config.model.head_dim is None:
        yield (
            f"hidden_size ({width}) must be divisible by num_attention_heads ({heads}); "
            f"num_attention_heads {would_work(divisors(width), heads)}, or set head_dim, the size of a head"
        )


@rule(MODEL_RULES, "num_attention_heads", "model_parallel_size")
def _heads_can_be_split(config: Config) -> Iterator[str]:
    heads, split = config.model.num_attention_heads, config.parallelism.model_parallel_size
    if heads % split:
        yield (
            f"num_attention_heads ({heads}) must be divisible by model_parallel_size ({split}); "
            f"{would_work(divisors(heads), split)}"
        )


@rule(MODEL_RULES, "num_attention_heads", "num_kv_heads")
def _groups_divide_the_heads(config: Config) -> Iterator[str]:
    heads, groups = config.model.num_attention_heads, config.model.num_kv_heads
    if groups is not None and heads % groups:
        yield (
            f"num_attention_heads ({heads}) must be divisible by num_kv_heads ({groups}); "
            f"num_kv_heads {would_work(divisors(heads), groups)}"
        )


@rule(MODEL_RULES, "num_kv_heads", "head_dim", "hidden_size", "num_attention_heads", "model_parallel_size")
def _groups_can_be_split(config: Config) -> Iterator[str]:
    """Key/value heads that ranks share are computed in equal parts (model/shared_heads.py)."""
    groups, split, size = config.model.num_kv_heads, config.parallelism.model_parallel_size, head_size(config.model)
    if groups is not None and groups * size % split:
        yield (
            f"num_kv_heads ({groups}) x head size ({size}) must be divisible by model_parallel_size ({split}); "
            f"{would_work(divisors(groups * size), split)}"
        )


@rule(MODEL_RULES, "seq_length", "sequence_parallel", "context_parallel_size", "model_parallel_size")
def _sequence_can_be_split(config: Config) -> Iterator[str]:
    length, keys = config.model.seq_length, config.parallelism
    tensor = keys.model_parallel_size if keys.sequence_parallel else 1
    parts = keys.context_parallel_size * tensor
    if length % parts:
        named = [f"context_parallel_size ({keys.context_parallel_size})"] if keys.context_parallel_size > 1 else []
        named += [f"model_parallel_size ({tensor}), as sequence_parallel is true"] if tensor > 1 else []
        yield f"seq_length ({length}) must be divisible by {' x '.join(named)}; {round_up(length, parts)} would work"


@rule(MODEL_RULES, "num_attention_heads", "context_parallel_size", "model_parallel_size")
def _context_shares_the_heads(config: Config) -> Iterator[str]:
    heads, keys = config.model.num_attention_heads, config.parallelism
    context, split = keys.context_parallel_size, keys.model_parallel_size
    if context > 1 and heads % split == 0 and heads // split % context:
        choices = would_work(divisors(heads // split), context)
        each = f" / model_parallel_size ({split})" if split > 1 else ""
        yield f"num_attention_heads ({heads}){each} must be divisible by context_parallel_size ({context}); {choices}"


@rule(MODEL_RULES, "context_parallel_size", "pipe_parallel_size")
def _context_excludes_a_pipeline(config: Config) -> Iterator[str]:
    context, stages = config.parallelism.context_parallel_size, config.parallelism.pipe_parallel_size
    if context > 1 and stages > 1:
        yield (
            f"context_parallel_size ({context}) excludes a pipeline (pipe_parallel_size {stages}), whose ranks "
            "DeepSpeed arranges without a context axis; set pipe_parallel_size to 0 and zero_optimization.stage to 1-3"
        )


@rule(MODEL_RULES, "intermediate_size", "ffn_hidden_size", "activation", "mlp_multiple_of")
def _width_is_set_once(config: Config) -> Iterator[str]:
    model = config.model
    if model.intermediate_size is not None and model.ffn_hidden_size is not None:
        yield (
            f"intermediate_size ({model.intermediate_size}) and ffn_hidden_size ({model.ffn_hidden_size}) "
            "set the same thing; keep ffn_hidden_size"
        )
    elif model.intermediate_size is not None and is_gated(model.activation):
        neox = neox_gated_width(model.intermediate_size, model.mlp_multiple_of)
        yield (
            f"intermediate_size ({model.intermediate_size}) has two meanings with the gated activation "
            f"{model.activation}; write one of these lines instead:\n"
            f'      "ffn_hidden_size": {neox}  (the width in GPT-NeoX)\n'
            f'      "ffn_hidden_size": {model.intermediate_size}  (the true width, as Hugging Face counts it)'
        )


@rule(MODEL_RULES, "intermediate_size", "ffn_hidden_size", "activation", "mlp_multiple_of", "hidden_size")
def _width_is_a_multiple(config: Config) -> Iterator[str]:
    model = config.model
    name = "ffn_hidden_size" if model.ffn_hidden_size is not None else "intermediate_size"
    if name == "intermediate_size" and is_gated(model.activation):
        return
    width, multiple = feed_forward_width(model), model.mlp_multiple_of
    if width % multiple:
        yield f"{name} ({width}) must be a multiple of mlp_multiple_of ({multiple}); {round_up(width, multiple)} is"


@rule(
    MODEL_RULES,
    "intermediate_size",
    "ffn_hidden_size",
    "activation",
    "mlp_multiple_of",
    "hidden_size",
    "model_parallel_size",
)
def _width_can_be_split(config: Config) -> Iterator[str]:
    model, split = config.model, config.parallelism.model_parallel_size
    if model.intermediate_size is not None and is_gated(model.activation):
        return
    width = feed_forward_width(model)
    if width % split:
        written = "" if model.ffn_hidden_size or model.intermediate_size else ", the default here,"
        yield (
            f"ffn_hidden_size ({width}){written} must be divisible by model_parallel_size ({split}); "
            f"ffn_hidden_size {round_up(width, split)} would work"
        )


@rule(MODEL_RULES, "max_position_embeddings", "seq_length")
def _positions_cover_the_sequence(config: Config) -> Iterator[str]:
    positions, length = config.model.max_position_embeddings, config.model.seq_length
    if positions is not None and positions < length:
        yield f"max_position_embeddings ({positions}) must be at least seq_length ({length}); leave it out or raise it"


@rule(MODEL_RULES, "pos_emb", "rotary_pct", "hidden_size", "num_attention_heads", "head_dim")
def _rotary_part_is_even(config: Config) -> Iterator[str]:
    model = config.model
    if model.pos_emb != "rotary" or (model.head_dim is None and model.hidden_size % model.num_attention_heads):
        return
    size, turned = head_size(model), rotary_elements(model)
    if turned % 2 or not turned:
        choices = [even / size for even in range(2, size + 1, 2)]
        best = min(choices, key=lambda share: abs(share - model.rotary_pct), default=None)
        hint = f"rotary_pct {best:g} would work" if best is not None else "use fewer heads"
        yield (
            f"rotary_pct ({model.rotary_pct:g}) rotates {turned} of the {size} elements of a head, "
            f"which must be an even number above 0; {hint}"
        )


@rule(MODEL_RULES, "pos_emb", "rpe_num_buckets", "rpe_max_distance")
def _buckets_belong_to_relative_positions(config: Config) -> Iterator[str]:
    model = config.model
    written = {"rpe_num_buckets": model.rpe_num_buckets, "rpe_max_distance": model.rpe_max_distance}
    for name, value in written.items():
        if model.pos_emb != "rpe" and value != type(model).model_fields[name].default:
            yield f"{name} ({value}) has no effect with pos_emb {model.pos_emb}; leave it out"
    if model.pos_emb != "rpe":
        return
    if model.rpe_num_buckets < 2:
        yield f"rpe_num_buckets ({model.rpe_num_buckets}) must be at least 2; GPT-NeoX and T5 have 32"
    elif model.rpe_max_distance <= model.rpe_num_buckets // 2:
        yield (
            f"rpe_max_distance ({model.rpe_max_distance}) must be above half of rpe_num_buckets "
            f"({model.rpe_num_buckets}), whose distances have a bucket each; {model.rpe_num_buckets * 4} would work"
        )


@rule(MODEL_RULES, "gpt_j_residual", "gpt_j_tied")
def _one_norm_needs_one_residual(config: Config) -> Iterator[str]:
    if config.model.gpt_j_tied and not config.model.gpt_j_residual:
        yield "gpt_j_tied (true) needs gpt_j_residual (false); set both to true, or gpt_j_tied to false"


@rule(MODEL_RULES, "norm", "norm_bias")
def _only_layernorm_has_a_bias(config: Config) -> Iterator[str]:
    norm = config.model.norm
    if not config.model.norm_bias and norm in ("rmsnorm", "rmsnorm_1p", "non_parametric_layernorm", "scalenorm"):
        yield f"norm_bias (false) has no effect with norm {norm}, which has no bias; leave it out"


@rule(MODEL_RULES, "norm", "qk_norm")
def _queries_and_keys_can_be_normalized(config: Config) -> Iterator[str]:
    norm, kind = config.model.norm, config.model.qk_norm
    if kind is not None and norm not in ("layernorm", "rmsnorm", "rmsnorm_1p"):
        yield f"qk_norm ({kind}) needs norm layernorm, rmsnorm or rmsnorm_1p, not {norm}; leave qk_norm out"


@rule(MODEL_RULES, "norm_placement", "gpt_j_residual")
def _norms_on_outputs_are_serial(config: Config) -> Iterator[str]:
    placement = config.model.norm_placement
    if placement != "input" and config.model.gpt_j_residual:
        yield (
            f"norm_placement ({placement}) and gpt_j_residual (true) exclude each other, because parallel branches are "
            "summed before there is an output to normalize; keep one of them"
        )


@rule(MODEL_RULES, "pos_emb", "rotary_interleaved", "rotary_emb_base_local", "no_rope_layer_interval", "num_layers")
def _rotary_keys_have_an_effect(config: Config) -> Iterator[str]:
    model = config.model
    for name in ("rotary_interleaved", "rotary_emb_base_local", "no_rope_layer_interval"):
        value = getattr(model, name)
        if value and model.pos_emb != "rotary":
            yield f"{name} ({show(value)}) has no effect with pos_emb {model.pos_emb}; leave it out"
    interval = model.no_rope_layer_interval
    if interval is not None and interval > model.num_layers:
        yield f"no_rope_layer_interval ({interval}) is more than num_layers ({model.num_layers}); leave it out"


@rule(MODEL_RULES, "pos_emb", "position_offset", "hidden_size")
def _added_positions_fit(config: Config) -> Iterator[str]:
    model = config.model
    if model.position_offset and model.pos_emb != "learned":
        yield f"position_offset ({model.position_offset}) has no effect with pos_emb {model.pos_emb}; leave it out"
    if model.pos_emb == "sinusoidal" and model.hidden_size % 2:
        yield f"pos_emb (sinusoidal) needs an even hidden_size, not {model.hidden_size}: half of it is sines"


@rule(MODEL_RULES, "rotary_emb_base_local", "attention_config")
def _a_local_base_needs_local_layers(config: Config) -> Iterator[str]:
    base = config.model.rotary_emb_base_local
    if base is not None and not any("local" in names for names, _ in config.model.attention_config or ()):
        yield f"rotary_emb_base_local ({base:g}) has no effect without local layers in attention_config; leave it out"


@rule(MODEL_RULES, "rope_scaling", "pos_emb")
def _rope_scaling_is_complete(config: Config) -> Iterator[str]:
    keys, model = config.model.rope_scaling, config.model
    needed, optional = _SCALING_KEYS[keys.rope_type]
    if keys.rope_type != "default" and model.pos_emb != "rotary":
        yield f"rope_scaling.rope_type ({keys.rope_type}) needs pos_emb rotary, not {model.pos_emb}; leave it out"
    if missing := [name for name in needed if getattr(keys, name) is None]:
        yield f"rope_scaling.rope_type ({keys.rope_type}) needs {', '.join(missing)}, as in the model's config.json"
    used = {"rope_type", *needed, *optional}
    if spare := [name for name in type(keys).model_fields if name not in used and getattr(keys, name) is not None]:
        yield f"rope_scaling: rope_type {keys.rope_type} does not use {', '.join(spare)}; leave it out"


_ORIGINAL = "original_max_position_embeddings"
# The keys that each kind needs, and those that it can do without.
_SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", _ORIGINAL), ()),
    "yarn": (
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL), ()),
    "longrope": (("factor", _ORIGINAL, "short_factor", "long_factor"), ("attention_factor",)),
}


@rule(MODEL_RULES, "rope_scaling", "rotary_pct", "hidden_size", "num_attention_heads", "head_dim")
def _rope_scaling_fits(config: Config) -> Iterator[str]:
    keys, model = config.model.rope_scaling, config.model
    low, high = keys.low_freq_factor, keys.high_freq_factor
    if keys.rope_type == "llama3" and low is not None and high is not None and low >= high:
        yield f"rope_scaling.low_freq_factor ({low:g}) must be below high_freq_factor ({high:g}); Llama 3.1: 1 and 4"
    slow, fast = keys.beta_slow or 1, keys.beta_fast or 32
    if keys.rope_type == "yarn" and slow >= fast:
        yield f"rope_scaling.beta_slow ({slow:g}) must be below beta_fast ({fast:g}); the usual values are 1 and 32"
    if (keys.mscale is None) != (keys.mscale_all_dim is None):
        yield "rope_scaling: mscale and mscale_all_dim have an effect together only; set both or none"
    elif keys.mscale is not None and keys.attention_factor is not None:
        yield "rope_scaling: mscale and mscale_all_dim have no effect with attention_factor; leave them out"
    pairs = rotary_elements(model) // 2
    if keys.rope_type == "dynamic" and pairs == 1:
        yield "rope_scaling.rope_type (dynamic) needs at least 4 rotated elements of a head, not 2; raise rotary_pct"
    for name in ("short_factor", "long_factor"):
        factors = getattr(keys, name)
        if keys.rope_type == "longrope" and factors is not None and len(factors) != pairs:
            yield (
                f"rope_scaling.{name} has {len(factors)} factors, but a head has {pairs} rotated pairs of elements; "
                "check rotary_pct and the size of a head against the model's config.json"
            )


@rule(MODEL_RULES, "head_bias", "no_weight_tying")
def _a_bias_needs_a_head_of_its_own(config: Config) -> Iterator[str]:
    if config.model.head_bias and not config.model.no_weight_tying:
        yield "head_bias (true) needs no_weight_tying (false): an embedding that serves as head has no bias; set both"


@rule(MODEL_RULES, "attention_config", "num_layers")
def _attention_covers_the_layers(config: Config) -> Iterator[str]:
    try:
        attention_names(config.model)
    except ValueError as error:
        yield f'attention_config {error}; [[["global"], "all"]] would work'


@rule(MODEL_RULES, "attention_config", "sliding_window_width")
def _windows_belong_to_local_layers(config: Config) -> Iterator[str]:
    width, kinds = config.model.sliding_window_width, config.model.attention_config or ()
    has_local = any("local" in names for names, _ in kinds)
    if has_local and width is None:
        yield "attention_config has local layers, which need sliding_window_width, the keys that a query sees"
    if width is not None and not has_local:
        yield (
            f"sliding_window_width ({width}) has no effect without local layers; "
            'add attention_config: [[["local"], "all"]], or leave it out'
        )


@rule(MODEL_RULES, "padded_vocab_size", "model_parallel_size")
def _rows_can_be_split(config: Config) -> Iterator[str]:
    rows, split = config.model.padded_vocab_size, config.parallelism.model_parallel_size
    if rows is not None and rows % split:
        yield (
            f"padded_vocab_size ({rows}) must be divisible by model_parallel_size ({split}); "
            f"{round_up(rows, split)} would work"
        )
