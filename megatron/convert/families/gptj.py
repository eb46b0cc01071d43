"""GPT-J: one norm for parallel branches, neighbouring elements rotated, a bias in the head."""

from megatron.convert.families.gpt2 import OLD_FIELDS
from megatron.convert.family import Family
from megatron.convert.fields import IGNORED, PLAIN, Choice, Computed, Required, dropouts, four_times, share_of
from megatron.convert.parameters import separate_heads

FAMILY = Family(
    name="GPT-J",
    model_type="gptj",
    architecture="GPTJForCausalLM",
    fields={
        "vocab_size": "vocab_size",
        "n_layer": "num_layers",
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_inner": four_times("n_inner", "n_embd"),
        "n_positions": "max_position_embeddings",
        "rotary_dim": Computed(
            lambda config: {"rotary_fraction": share_of(config["rotary_dim"], config["n_embd"] // config["n_head"])},
            lambda model: int(model.head_size * model.rotary_fraction),
        ),
        "layer_norm_epsilon": "norm_epsilon",
        "activation_function": Choice("activation", PLAIN),
        "tie_word_embeddings": Required(False),
        **dropouts("attn_pdrop", "resid_pdrop", "embd_pdrop"),
        **dict.fromkeys((*OLD_FIELDS, "rotary", "scale_attn_weights"), IGNORED),
    },
    fixed={
        "norm": "layernorm",
        "position_embedding": "rotary",
        "rotary_interleaved": True,
        "parallel_residual": True,
        "tied_norm": True,
        "tied_embeddings": False,
        "head_bias": True,
        "bias_in_query_key_value": False,
        "bias_in_dense": False,
        "bias_in_mlp": True,
    },
    prefix="transformer.",
    modules={"embedding": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"},
    layers="transformer.h",
    block={
        "input_norm": "ln_1",
        "attention.query_key_value": separate_heads("attn"),
        "attention.dense": "attn.out_proj",
        "mlp.up": "mlp.fc_in",
        "mlp.down": "mlp.fc_out",
    },
    ignored=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),  # buffers
)
