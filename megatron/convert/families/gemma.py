"""Gemma 1: Llama with norms that multiply by 1 + weight, and a scaled embedding."""

from megatron.convert.families.llama import ATTENTION_BIAS, BASE, HEAD_SIZE
from megatron.convert.fields import SCALED_EMBEDDING, Required

FAMILY = BASE.like(
    "Gemma",
    "gemma",
    "GemmaForCausalLM",
    fields=HEAD_SIZE | ATTENTION_BIAS | SCALED_EMBEDDING | {"use_bidirectional_attention": Required(None, False)},
    fixed={"norm": "rmsnorm_1p"},
)
