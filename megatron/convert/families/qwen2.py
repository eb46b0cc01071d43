"""Qwen 2 and 2.5: biases in queries, keys and values; a window in the last layers of some."""

from megatron.convert.families.llama import BASE
from megatron.convert.fields import IGNORED, Fields, Written, layer_types

WINDOWS: Fields = {
    "layer_types": layer_types(),
    "sliding_window": Written(lambda model: model.sliding_window),
    "use_sliding_window": Written(lambda model: "local" in model.attention_kinds),
    "max_window_layers": IGNORED,  # says what layer_types says
}
FAMILY = BASE.like("Qwen 2", "qwen2", "Qwen2ForCausalLM", fields=WINDOWS, fixed={"bias_in_query_key_value": True})
