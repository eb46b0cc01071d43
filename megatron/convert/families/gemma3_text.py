"""Gemma 3, without images: each head of queries and keys normalized, another base in layers with windows."""

from typing import Any

from megatron.config.plan import ModelPlan
from megatron.convert.families.gemma2 import FAMILY as GEMMA2
from megatron.convert.fields import IGNORED, Computed, Required, Values, read_scaling, write_scaling
from megatron.errors import UserError


def _read(config: Values) -> dict[str, Any]:
    positions = config["max_position_embeddings"]
    whole, local = config["rope_parameters"]["full_attention"], config["rope_parameters"]["sliding_attention"]
    if read_scaling(local, positions) is not None:
        raise UserError("rope_parameters.sliding_attention must have no scaling here")
    return {
        "position_embedding": "rotary",
        "rotary_base": float(whole["rope_theta"]),
        "rotary_base_local": float(local["rope_theta"]) if "sliding_attention" in config["layer_types"] else None,
        "rope_scaling": read_scaling(whole, positions),
    }


def _write(model: ModelPlan) -> dict[str, Any]:
    local = model.rotary_base if model.rotary_base_local is None else model.rotary_base_local
    return {
        "full_attention": {"rope_theta": model.rotary_base, **write_scaling(model.rope_scaling)},
        "sliding_attention": {"rope_theta": local, "rope_type": "default"},
    }


FAMILY = GEMMA2.like(
    "Gemma 3",
    "gemma3_text",
    "Gemma3ForCausalLM",
    fields={
        "rope_parameters": Computed(_read, _write),
        "attn_logit_softcapping": Required(None),
        "_sliding_window_pattern": IGNORED,  # says what layer_types says
        "sliding_window_pattern": IGNORED,
        "use_bidirectional_attention": Required(False),
    },
    fixed={"qk_norm": "head"},
    block={"attention.norm.query": "self_attn.q_norm", "attention.norm.key": "self_attn.k_norm"},
)
