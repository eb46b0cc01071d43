"""Phi-1.5 and Phi-2: one norm for parallel branches, biases everywhere."""

from megatron.convert.families.llama import BASE
from megatron.convert.fields import PLAIN, Choice, Required, dropouts, rotary
from megatron.convert.parameters import separate_heads

FAMILY = BASE.like(
    "Phi",
    "phi",
    "PhiForCausalLM",
    fields={
        "rope_parameters": rotary(partial=True),
        "layer_norm_eps": "norm_epsilon",
        "hidden_act": Choice("activation", PLAIN),
        "qk_layernorm": Choice("qk_norm", {False: None, True: "head"}),
        "tie_word_embeddings": Required(False),
        **dropouts("attention_dropout", "resid_pdrop", "embd_pdrop"),
    },
    fixed={
        "norm": "layernorm",
        "parallel_residual": True,
        "tied_norm": True,
        "tied_embeddings": False,
        "head_bias": True,
        "bias_in_query_key_value": True,
        "bias_in_dense": True,
        "bias_in_mlp": True,
    },
    modules={"final_norm": "model.final_layernorm"},
    block={
        "attention.query_key_value": separate_heads("self_attn"),
        "attention.dense": "self_attn.dense",
        "attention.norm.query": "self_attn.q_layernorm",
        "attention.norm.key": "self_attn.k_layernorm",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    },
    without=("rms_norm_eps", "mlp.gate", "post_attention_norm"),
)
