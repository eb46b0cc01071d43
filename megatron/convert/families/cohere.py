"""Cohere (Command R): one norm without bias for parallel branches, neighbouring elements rotated, scaled logits."""

from megatron.convert.families.llama import ATTENTION_BIAS, BASE
from megatron.convert.fields import Choice
from megatron.convert.parameters import weights_of_heads

FAMILY = BASE.like(
    "Cohere",
    "cohere",
    "CohereForCausalLM",
    fields={
        **ATTENTION_BIAS,
        "layer_norm_eps": "norm_epsilon",
        "logit_scale": "logit_multiplier",
        "use_qk_norm": Choice("qk_norm", {False: None, True: "each_head"}),
    },
    fixed={
        "norm": "layernorm",
        "norm_bias": False,
        "parallel_residual": True,
        "tied_norm": True,
        "rotary_interleaved": True,
    },
    block={
        "attention.norm.query": weights_of_heads("self_attn.q_norm"),
        "attention.norm.key": weights_of_heads("self_attn.k_norm"),
    },
    without=("rms_norm_eps", "post_attention_norm"),
)
