"""OLMo 2: queries and keys normalized over all heads, and norms on the outputs of both branches."""

from megatron.convert.families.llama import ATTENTION_BIAS, BASE

FAMILY = BASE.like(
    "OLMo 2",
    "olmo2",
    "Olmo2ForCausalLM",
    fields=ATTENTION_BIAS,
    fixed={"qk_norm": "full", "norm_placement": "output"},
    block={
        "attention.norm.query": "self_attn.q_norm",
        "attention.norm.key": "self_attn.k_norm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
)
