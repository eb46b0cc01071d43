"""MPT: alibi, no biases."""

from typing import Any

from megatron.config.plan import ModelPlan
from megatron.convert.family import Family
from megatron.convert.fields import IGNORED, Computed, Required, Values, Written
from megatron.convert.parameters import fused_heads
from megatron.errors import UserError

# of attn_config; those left out change nothing
REQUIRED = {"attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "alibi": True, "alibi_bias_max": 8}


def _attention(config: Values) -> dict[str, Any]:
    given = config["attn_config"]
    wrong = {name: value for name, value in REQUIRED.items() if given.get(name, value) != value}
    if wrong:
        raise UserError(*(f"attn_config.{name} must be {value!r} here" for name, value in wrong.items()))
    return {"clip_qkv": given.get("clip_qkv"), "attention_scale": given.get("softmax_scale")}


def _their_attention(model: ModelPlan) -> dict[str, Any]:
    return {**REQUIRED, "clip_qkv": model.clip_qkv, "softmax_scale": model.attention_scale}


FAMILY = Family(
    name="MPT",
    model_type="mpt",
    architecture="MptForCausalLM",
    fields={
        "vocab_size": "vocab_size",
        "n_layers": "num_layers",
        "d_model": Computed(
            lambda config: {"hidden_size": config["d_model"], "ffn_hidden_size": 4 * config["d_model"]},
            lambda model: model.hidden_size,
        ),
        "n_heads": "num_attention_heads",
        "expansion_ratio": Required(4),  # which their model takes for granted
        "max_seq_len": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "attn_config": Computed(_attention, _their_attention),
        "no_bias": Required(True),
        "logit_scale": Required(None),
        "tie_word_embeddings": "tied_embeddings",
        "resid_pdrop": Written(lambda model: model.hidden_dropout),
        "emb_pdrop": Written(lambda model: model.hidden_dropout),
        **dict.fromkeys(("embedding_fraction", "norm_type", "init_device", "learned_pos_emb", "init_config"), IGNORED),
    },
    fixed={
        "norm": "layernorm",
        "norm_bias": False,
        "position_embedding": "alibi",
        "activation": "gelu",
        "bias_in_query_key_value": False,
        "bias_in_dense": False,
        "bias_in_mlp": False,
    },
    prefix="transformer.",
    modules={"embedding": "transformer.wte", "final_norm": "transformer.norm_f", "head": "lm_head"},
    layers="transformer.blocks",
    block={
        "input_norm": "norm_1",
        "attention.query_key_value": fused_heads("attn.Wqkv"),
        "attention.dense": "attn.out_proj",
        "post_attention_norm": "norm_2",
        "mlp.up": "ffn.up_proj",
        "mlp.down": "ffn.down_proj",
    },
)
