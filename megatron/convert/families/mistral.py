"""Mistral: Llama with a window in all layers."""

from megatron.convert.families.llama import BASE, HEAD_SIZE
from megatron.convert.fields import Computed, one_window

FAMILY = BASE.like(
    "Mistral",
    "mistral",
    "MistralForCausalLM",
    fields=HEAD_SIZE | {"sliding_window": Computed(one_window, lambda model: model.sliding_window)},
)
