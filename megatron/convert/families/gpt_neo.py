"""GPT-Neo: windows in every second layer, scores without a scale."""

from megatron.convert.families.gpt2 import FAMILY as GPT2
from megatron.convert.families.gpt2 import OLD_FIELDS
from megatron.convert.family import Family
from megatron.convert.fields import IGNORED, PLAIN, Choice, Computed, Values, Written, dropouts, four_times
from megatron.convert.model_keys import attention_config
from megatron.convert.parameters import separate_heads


def _layers(config: Values) -> dict[str, object]:
    kinds = tuple(config["attention_layers"])
    return {"attention_kinds": kinds, "sliding_window": config["window_size"] if "local" in kinds else None}


FAMILY = Family(
    name="GPT-Neo",
    model_type="gpt_neo",
    architecture="GPTNeoForCausalLM",
    fields={
        "vocab_size": "vocab_size",
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "intermediate_size": four_times("intermediate_size", "hidden_size"),
        "max_position_embeddings": "max_position_embeddings",
        "attention_types": Computed(_layers, lambda model: attention_config(model.attention_kinds)),
        "attention_layers": IGNORED,  # made of attention_types
        "window_size": Written(lambda model: model.sliding_window or 256),
        "layer_norm_epsilon": "norm_epsilon",
        "activation_function": Choice("activation", PLAIN),
        "tie_word_embeddings": "tied_embeddings",
        **dropouts("attention_dropout", "resid_dropout", "embed_dropout"),
        **dict.fromkeys(OLD_FIELDS, IGNORED),
    },
    fixed={
        "norm": "layernorm",
        "position_embedding": "learned",
        "attention_scale": 1.0,
        "bias_in_query_key_value": False,
        "bias_in_dense": True,
        "bias_in_mlp": True,
    },
    prefix="transformer.",
    modules=GPT2.modules,
    layers="transformer.h",
    block={
        "input_norm": "ln_1",
        "attention.query_key_value": separate_heads("attn.attention"),
        "attention.dense": "attn.attention.out_proj",
        "post_attention_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    ignored=(".attn.attention.bias", ".attn.attention.masked_bias"),  # buffers
)
