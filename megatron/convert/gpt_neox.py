"""Map Hugging Face's GPTNeoXForCausalLM (GPT-NeoX-20B, Pythia) to our GPT."""

from typing import Any

from megatron.config.plan import ModelPlan
from megatron.convert.maps import Entry, ParameterMap, named_as, require, rotary_keys, same, weight_and_bias

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
IGNORED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")  # buffers of older versions


def model_keys(config: Any) -> dict[str, Any]:
    """Our configuration keys for a transformers.GPTNeoXConfig. Raises UserError for unsupported settings."""
    return rotary_keys(config) | {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "ffn_hidden_size": config.intermediate_size,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "norm": "layernorm",
        "layernorm_epsilon": config.layer_norm_eps,
        "activation": named_as(ACTIVATIONS, config.hidden_act, "hidden_act"),
        "gpt_j_residual": config.use_parallel_residual,
        "gpt_j_tied": False,
        "no_weight_tying": not config.tie_word_embeddings,
        "use_bias_in_attn_linear": config.attention_bias,
        "use_bias_in_mlp": True,
    }


def parameter_map(model: ModelPlan) -> ParameterMap:
    """The map of all parameters. Raises UserError for a model that GPTNeoXForCausalLM cannot hold.

    Its fused query, key and value are grouped by head, as ours are.
    """
    require(
        model,
        "GPTNeoX",
        norm=["layernorm"],
        position_embedding=["rotary"],
        activation=sorted(set(ACTIVATIONS.values())),
        num_kv_heads=[model.num_attention_heads],
        head_size=[model.hidden_size // model.num_attention_heads],
        tied_norm=[False],
        bias_in_mlp=[True],
    )
    entries = [same("embedding.weight", "gpt_neox.embed_in.weight")]
    for index in range(model.num_layers):
        entries += _block(f"blocks.{index}", f"gpt_neox.layers.{index}", model)
    entries += weight_and_bias(same, "final_norm", "gpt_neox.final_layer_norm", True)
    if model.tied_embeddings:
        return ParameterMap(entries, (*IGNORED, "lm_head.weight"))
    return ParameterMap([*entries, same("head.weight", "lm_head.weight")], IGNORED)


def _block(ours: str, theirs: str, model: ModelPlan) -> list[Entry]:
    bias = model.bias_in_dense
    return [
        *weight_and_bias(same, f"{ours}.input_norm", f"{theirs}.input_layernorm", True),
        *weight_and_bias(same, f"{ours}.attention.query_key_value", f"{theirs}.attention.query_key_value", bias),
        *weight_and_bias(same, f"{ours}.attention.dense", f"{theirs}.attention.dense", bias),
        *weight_and_bias(same, f"{ours}.post_attention_norm", f"{theirs}.post_attention_layernorm", True),
        *weight_and_bias(same, f"{ours}.mlp.up", f"{theirs}.mlp.dense_h_to_4h", True),
        *weight_and_bias(same, f"{ours}.mlp.down", f"{theirs}.mlp.dense_4h_to_h", True),
    ]
