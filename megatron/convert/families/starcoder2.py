"""StarCoder 2: Llama with layer norms, biases and a feed-forward layer without a gate."""

from megatron.convert.families.llama import BASE
from megatron.convert.fields import PLAIN, Choice, Computed, dropouts, one_window

FAMILY = BASE.like(
    "StarCoder 2",
    "starcoder2",
    "Starcoder2ForCausalLM",
    fields={
        "norm_epsilon": "norm_epsilon",
        "hidden_act": Choice("activation", PLAIN),
        "use_bias": ("bias_in_query_key_value", "bias_in_dense", "bias_in_mlp"),
        "sliding_window": Computed(one_window, lambda model: model.sliding_window),
        **dropouts("attention_dropout", "residual_dropout", "embedding_dropout"),
    },
    fixed={"norm": "layernorm"},
    block={"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    without=("rms_norm_eps", "mlp.gate"),
)
