"""Granite: Llama with multipliers."""

from megatron.convert.families.llama import ATTENTION_BIAS, BASE, MLP_BIAS
from megatron.convert.fields import Computed, exact

FAMILY = BASE.like(
    "Granite",
    "granite",
    "GraniteForCausalLM",
    fields={
        **ATTENTION_BIAS,
        **MLP_BIAS,
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "attention_multiplier": Computed(
            lambda config: {"attention_scale": config["attention_multiplier"]},
            lambda model: model.head_size**-0.5 if model.attention_scale is None else model.attention_scale,
        ),
        "logits_scaling": Computed(
            lambda config: {"logit_multiplier": 1 / config["logits_scaling"]},
            lambda model: exact(1 / model.logit_multiplier, lambda scaling: 1 / scaling, model.logit_multiplier),
        ),
    },
)
