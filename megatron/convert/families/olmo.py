"""OLMo 1: Llama with norms that have no parameters."""

from megatron.convert.families.llama import ATTENTION_BIAS, BASE

FAMILY = BASE.like(
    "OLMo",
    "olmo",
    "OlmoForCausalLM",
    fields=ATTENTION_BIAS | {"clip_qkv": "clip_qkv"},
    fixed={"norm": "non_parametric_layernorm", "norm_epsilon": 1e-5},
    without=("rms_norm_eps",),
)
