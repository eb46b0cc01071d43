"""Qwen 3: each head of queries and keys normalized."""

from megatron.convert.families.llama import ATTENTION_BIAS, BASE, HEAD_SIZE
from megatron.convert.families.qwen2 import WINDOWS

FAMILY = BASE.like(
    "Qwen 3",
    "qwen3",
    "Qwen3ForCausalLM",
    fields=HEAD_SIZE | ATTENTION_BIAS | WINDOWS,
    fixed={"qk_norm": "head"},
    block={"attention.norm.query": "self_attn.q_norm", "attention.norm.key": "self_attn.k_norm"},
)
