"""Llama 1 to 3, and what most later architectures share with it."""

from megatron.convert.family import Family
from megatron.convert.fields import GATED, SIZES, Choice, Fields, dropouts, rotary
from megatron.convert.parameters import separate_heads

# Without the fields of biases, of heads of another size and of windows, which differ.
BASE = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields={
        **SIZES,
        "num_key_value_heads": "num_kv_heads",
        "rope_parameters": rotary(),
        "rms_norm_eps": "norm_epsilon",
        "hidden_act": Choice("activation", GATED),
        "tie_word_embeddings": "tied_embeddings",
        **dropouts("attention_dropout"),
    },
    fixed={"norm": "rmsnorm", "bias_in_query_key_value": False, "bias_in_dense": False, "bias_in_mlp": False},
    prefix="model.",
    modules={"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    layers="model.layers",
    block={
        "input_norm": "input_layernorm",
        "attention.query_key_value": separate_heads("self_attn"),
        "attention.dense": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    },
    ignored=("rotary_emb.inv_freq",),  # a buffer of older versions
)
HEAD_SIZE: Fields = {"head_dim": "head_size"}
ATTENTION_BIAS: Fields = {"attention_bias": ("bias_in_query_key_value", "bias_in_dense")}
MLP_BIAS: Fields = {"mlp_bias": "bias_in_mlp"}

FAMILY = BASE.like("Llama", "llama", "LlamaForCausalLM", fields=HEAD_SIZE | ATTENTION_BIAS | MLP_BIAS)
