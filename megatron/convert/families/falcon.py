"""Falcon: the decoder of the 7B and the RW models, and the new one of the 40B and 180B."""

from typing import Any

from megatron.config.plan import ModelPlan
from megatron.convert.family import Family
from megatron.convert.fields import PLAIN, SIZES, Choice, Computed, Values, Written, dropouts, rotary
from megatron.convert.parameters import either
from megatron.errors import UserError

ROTARY = rotary()


def _read(config: Values) -> dict[str, Any]:
    """The order of branches and norms, and the key/value heads."""
    heads, norms = config["num_attention_heads"], config["num_ln_in_parallel_attn"]
    if config["new_decoder_architecture"]:
        return {"parallel_residual": True, "tied_norm": norms == 1, "num_kv_heads": config["num_kv_heads"]}
    if norms == 2:
        raise UserError("num_ln_in_parallel_attn 2 needs new_decoder_architecture")
    parallel = config["parallel_attn"]
    return {"parallel_residual": parallel, "tied_norm": parallel, "num_kv_heads": 1 if config["multi_query"] else heads}


def _is_new(model: ModelPlan) -> bool:
    return model.parallel_residual and (not model.tied_norm or 1 < model.num_kv_heads < model.num_attention_heads)


def _positions(config: Values) -> dict[str, Any]:
    return {"position_embedding": "alibi_bf16"} if config["alibi"] else ROTARY.read(config)


FAMILY = Family(
    name="Falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    fields={
        **{name: field for name, field in SIZES.items() if name != "intermediate_size"},
        "ffn_hidden_size": "ffn_hidden_size",
        "new_decoder_architecture": Computed(_read, _is_new),
        "num_ln_in_parallel_attn": Written(lambda model: (1 if model.tied_norm else 2) if _is_new(model) else None),
        "parallel_attn": Written(lambda model: model.parallel_residual),
        "multi_query": Written(lambda model: model.num_kv_heads == 1),
        "num_kv_heads": Written(lambda model: model.num_kv_heads),
        "alibi": Computed(_positions, lambda model: model.position_embedding != "rotary"),
        "rope_parameters": Written(ROTARY.write),
        "bias": ("bias_in_query_key_value", "bias_in_dense", "bias_in_mlp"),
        "layer_norm_epsilon": "norm_epsilon",
        "activation": Choice("activation", PLAIN),
        "tie_word_embeddings": "tied_embeddings",
        **dropouts("attention_dropout", "hidden_dropout"),
    },
    fixed={"norm": "layernorm"},
    prefix="transformer.",
    modules={"embedding": "transformer.word_embeddings", "final_norm": "transformer.ln_f", "head": "lm_head"},
    layers="transformer.h",
    block={
        "input_norm": either(lambda model: "ln_attn" if _two_norms(model) else "input_layernorm"),
        "attention.query_key_value": "self_attention.query_key_value",  # grouped by key/value head, as ours
        "attention.dense": "self_attention.dense",
        "post_attention_norm": either(lambda model: "ln_mlp" if _two_norms(model) else "post_attention_layernorm"),
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
)


def _two_norms(model: ModelPlan) -> bool:
    """Whether parallel branches have a norm each."""
    return model.parallel_residual and not model.tied_norm
