"""SmolLM 3: Llama of which every fourth layer has no positions."""

from megatron.convert.families.llama import ATTENTION_BIAS, BASE, MLP_BIAS
from megatron.convert.families.qwen2 import WINDOWS
from megatron.convert.fields import IGNORED, Computed

FAMILY = BASE.like(
    "SmolLM 3",
    "smollm3",
    "SmolLM3ForCausalLM",
    fields={
        **ATTENTION_BIAS,
        **MLP_BIAS,
        **WINDOWS,
        "no_rope_layers": Computed(
            lambda config: {
                "layers_without_rotary": tuple(i for i, rotated in enumerate(config["no_rope_layers"]) if not rotated)
            },
            lambda model: [int(i not in model.layers_without_rotary) for i in range(model.num_layers)],
        ),
        "no_rope_layer_interval": IGNORED,  # says what no_rope_layers says
    },
)
