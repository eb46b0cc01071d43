"""StableLM: Llama with layer norms, a part of each head rotated, and parallel branches in some."""

from megatron.convert.families.llama import BASE
from megatron.convert.fields import Choice, dropouts, rotary
from megatron.convert.parameters import norms_of_heads

FAMILY = BASE.like(
    "StableLM",
    "stablelm",
    "StableLmForCausalLM",
    fields={
        "layer_norm_eps": "norm_epsilon",
        "rope_parameters": rotary(partial=True),
        "use_qkv_bias": "bias_in_query_key_value",
        "use_parallel_residual": ("parallel_residual", "tied_norm"),
        "qk_layernorm": Choice("qk_norm", {False: None, True: "each_head"}),
        **dropouts("attention_dropout", "hidden_dropout"),
    },
    fixed={"norm": "layernorm"},
    block={
        "attention.norm.query": norms_of_heads("self_attn.q_layernorm.norms"),
        "attention.norm.key": norms_of_heads("self_attn.k_layernorm.norms"),
    },
    without=("rms_norm_eps",),
)
