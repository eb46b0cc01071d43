"""OPT, but for OPT-350M, whose norms follow the sum and whose embedding has another width."""

from typing import Any

from megatron.convert.family import Family
from megatron.convert.fields import IGNORED, PLAIN, SIZES, Choice, Computed, Required, Values, dropouts
from megatron.convert.parameters import separate_heads
from megatron.errors import UserError


def _same_width(config: Values) -> dict[str, Any]:
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        raise UserError("word_embed_proj_dim must be hidden_size here")
    return {}


FAMILY = Family(
    name="OPT",
    model_type="opt",
    architecture="OPTForCausalLM",
    fields={
        **{name: field for name, field in SIZES.items() if name != "intermediate_size"},
        "ffn_dim": "ffn_hidden_size",
        "word_embed_proj_dim": Computed(_same_width, lambda model: model.hidden_size),
        "activation_function": Choice("activation", PLAIN),
        "enable_bias": ("bias_in_query_key_value", "bias_in_dense", "bias_in_mlp"),
        "tie_word_embeddings": "tied_embeddings",
        "do_layer_norm_before": Required(True),
        "layer_norm_elementwise_affine": Required(True),
        "_remove_final_layer_norm": Required(False),
        "layerdrop": IGNORED,
        "init_std": IGNORED,
        **dropouts("attention_dropout", "dropout"),
        **dict.fromkeys(("activation_dropout", "prefix"), IGNORED),
    },
    fixed={"norm": "layernorm", "norm_epsilon": 1e-5, "position_embedding": "learned", "position_offset": 2},
    prefix="model.",
    modules={
        "embedding": "model.decoder.embed_tokens",
        "embedding.positions": "model.decoder.embed_positions",
        "final_norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
    },
    layers="model.decoder.layers",
    block={
        "input_norm": "self_attn_layer_norm",
        "attention.query_key_value": separate_heads("self_attn"),
        "attention.dense": "self_attn.out_proj",
        "post_attention_norm": "final_layer_norm",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    },
)
