"""GPT-NeoX-20B and Pythia."""

from megatron.convert.family import Family
from megatron.convert.fields import PLAIN, SIZES, Choice, dropouts, rotary

FAMILY = Family(
    name="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields={
        **SIZES,
        "rope_parameters": rotary(partial=True),
        "layer_norm_eps": "norm_epsilon",
        "hidden_act": Choice("activation", PLAIN),
        "use_parallel_residual": "parallel_residual",
        "attention_bias": ("bias_in_query_key_value", "bias_in_dense"),
        "tie_word_embeddings": "tied_embeddings",
        **dropouts("attention_dropout", "hidden_dropout"),
    },
    fixed={"norm": "layernorm", "bias_in_mlp": True},
    prefix="gpt_neox.",
    modules={"embedding": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm", "head": "lm_head"},
    layers="gpt_neox.layers",
    block={
        "input_norm": "input_layernorm",
        "attention.query_key_value": "attention.query_key_value",  # grouped by head, as ours
        "attention.dense": "attention.dense",
        "post_attention_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    in_files={"lm_head.weight": "embed_out.weight"},
    ignored=("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"),  # buffers of older versions
)
