"""GPT-2."""

from megatron.convert.family import Family
from megatron.convert.fields import IGNORED, PLAIN, Choice, Required, dropouts, four_times
from megatron.convert.parameters import fused_heads, transposed

OLD_FIELDS = (
    "n_ctx",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)

FAMILY = Family(
    name="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields={
        "vocab_size": "vocab_size",
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": four_times("n_inner", "n_embd"),
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "activation_function": Choice("activation", PLAIN),
        "tie_word_embeddings": "tied_embeddings",
        "scale_attn_weights": Required(True),
        "scale_attn_by_inverse_layer_idx": Required(False),
        "add_cross_attention": Required(False),
        "reorder_and_upcast_attn": IGNORED,  # the order of operations in 16 bit
        **dropouts("attn_pdrop", "resid_pdrop", "embd_pdrop"),
        **dict.fromkeys(OLD_FIELDS, IGNORED),
    },
    fixed={
        "norm": "layernorm",
        "position_embedding": "learned",
        "bias_in_query_key_value": True,
        "bias_in_dense": True,
        "bias_in_mlp": True,
    },
    prefix="transformer.",
    modules={
        "embedding": "transformer.wte",
        "embedding.positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    layers="transformer.h",
    block={
        "input_norm": "ln_1",
        "attention.query_key_value": fused_heads("attn.c_attn", inputs_first=True),
        "attention.dense": transposed("attn.c_proj"),
        "post_attention_norm": "ln_2",
        "mlp.up": transposed("mlp.c_fc"),
        "mlp.down": transposed("mlp.c_proj"),
    },
    ignored=(".attn.bias", ".attn.masked_bias"),  # buffers of older versions
)
