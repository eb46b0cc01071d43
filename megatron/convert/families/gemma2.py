"""Gemma 2: norms before and after each branch, caps, windows in every second layer."""

from megatron.convert.families.gemma import FAMILY as GEMMA
from megatron.convert.fields import GATED, SCORE_SCALE, Choice, Written, layer_types

FAMILY = GEMMA.like(
    "Gemma 2",
    "gemma2",
    "Gemma2ForCausalLM",
    fields={
        "hidden_activation": Choice("activation", GATED),
        "query_pre_attn_scalar": SCORE_SCALE,
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
        "layer_types": layer_types(),
        "sliding_window": Written(lambda model: model.sliding_window),
    },
    fixed={"norm_placement": "both"},
    block={"pre_mlp_norm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm"},
    without=("hidden_act",),
)
