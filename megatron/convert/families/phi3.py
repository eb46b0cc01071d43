"""Phi-3 and Phi-4: Llama with fused layers."""

from megatron.convert.families.llama import BASE
from megatron.convert.fields import Computed, Written, one_window, rotary
from megatron.convert.parameters import fused_gate, fused_heads

FAMILY = BASE.like(
    "Phi-3",
    "phi3",
    "Phi3ForCausalLM",
    fields={
        "rope_parameters": rotary(partial=True),
        "sliding_window": Computed(one_window, lambda model: model.sliding_window),
        "resid_pdrop": Written(lambda model: model.hidden_dropout),
        "embd_pdrop": Written(lambda model: model.hidden_dropout),
        # their class copies it into rope_parameters
        "original_max_position_embeddings": Written(
            lambda model: model.rope_scaling.original_positions if model.rope_scaling else model.max_position_embeddings
        ),
    },
    block={
        "attention.query_key_value": fused_heads("self_attn.qkv_proj"),
        "mlp.gate+mlp.up": fused_gate("mlp.gate_up_proj"),
    },
    without=("mlp.gate", "mlp.up"),
)
