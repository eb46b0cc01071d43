"""LlamaForCausalLM of Hugging Face and our GPT. Floor 5."""

from typing import Any

from megatron.config.plan import ModelPlan
from megatron.convert.maps import (
    Entry,
    ParameterMap,
    named_as,
    require,
    rotary_keys,
    same,
    separate_heads,
    weight_and_bias,
)
from megatron.errors import UserError

ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
IGNORED = ("rotary_emb.inv_freq",)  # a buffer of older versions


def model_keys(config: Any) -> dict[str, Any]:
    """Our configuration keys for a transformers.LlamaConfig. Raises UserError for what we cannot express."""
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise UserError(f"head_dim ({config.head_dim}) must be hidden_size / num_attention_heads here")
    return rotary_keys(config) | {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "ffn_hidden_size": config.intermediate_size,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "norm": "rmsnorm",
        "rms_norm_epsilon": config.rms_norm_eps,
        "activation": named_as(ACTIVATIONS, config.hidden_act, "hidden_act"),
        "gpt_j_residual": False,
        "no_weight_tying": not config.tie_word_embeddings,
        "use_bias_in_attn_linear": config.attention_bias,
        "use_bias_in_mlp": config.mlp_bias,
    }


def parameter_map(model: ModelPlan) -> ParameterMap:
    """The map of every parameter. Raises UserError for a model that LlamaForCausalLM cannot hold."""
    require(
        model,
        "Llama",
        norm=["rmsnorm"],
        position_embedding=["rotary"],
        rotary_fraction=[1.0],
        activation=sorted(set(ACTIVATIONS.values())),
        parallel_residual=[False],
    )
    entries = [same("embedding.weight", "model.embed_tokens.weight")]
    for index in range(model.num_layers):
        entries += _block(f"blocks.{index}", f"model.layers.{index}", model)
    entries.append(same("final_norm.weight", "model.norm.weight"))
    if model.tied_embeddings:
        return ParameterMap(entries, (*IGNORED, "lm_head.weight"))
    return ParameterMap([*entries, same("head.weight", "lm_head.weight")], IGNORED)


def _block(ours: str, theirs: str, model: ModelPlan) -> list[Entry]:
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    kinds = ("weight", "bias") if model.bias_in_attention else ("weight",)
    return [
        same(f"{ours}.input_norm.weight", f"{theirs}.input_layernorm.weight"),
        *(
            separate_heads(
                f"{ours}.attention.query_key_value.{kind}",
                (f"{attention}.q_proj.{kind}", f"{attention}.k_proj.{kind}", f"{attention}.v_proj.{kind}"),
                model,
            )
            for kind in kinds
        ),
        *weight_and_bias(same, f"{ours}.attention.dense", f"{attention}.o_proj", model.bias_in_attention),
        same(f"{ours}.post_attention_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        *weight_and_bias(same, f"{ours}.mlp.gate", f"{mlp}.gate_proj", model.bias_in_mlp),
        *weight_and_bias(same, f"{ours}.mlp.up", f"{mlp}.up_proj", model.bias_in_mlp),
        *weight_and_bias(same, f"{ours}.mlp.down", f"{mlp}.down_proj", model.bias_in_mlp),
    ]
