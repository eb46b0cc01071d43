"""BLOOM: alibi, and a norm of the embedding."""

from megatron.convert.family import Family
from megatron.convert.fields import IGNORED, Computed, Required, dropouts

FAMILY = Family(
    name="BLOOM",
    model_type="bloom",
    architecture="BloomForCausalLM",
    fields={
        "vocab_size": "vocab_size",
        "n_layer": "num_layers",
        "hidden_size": Computed(
            lambda config: {"hidden_size": config["hidden_size"], "ffn_hidden_size": 4 * config["hidden_size"]},
            lambda model: model.hidden_size,
        ),
        "n_head": "num_attention_heads",
        "seq_length": Computed(  # which their class does not know, as alibi has no limit
            lambda config: {"max_position_embeddings": config.get("seq_length", 2048)},
            lambda model: model.max_position_embeddings,
        ),
        "layer_norm_epsilon": "norm_epsilon",
        "tie_word_embeddings": "tied_embeddings",
        "apply_residual_connection_post_layernorm": Required(False),
        **dropouts("attention_dropout", "hidden_dropout"),
        **dict.fromkeys(
            (
                "slow_but_exact",
                "attention_softmax_in_fp32",
                "bias_dropout_fusion",
                "masked_softmax_fusion",
                "offset_alibi",
                "skip_bias_add",
                "skip_bias_add_qkv",
                "n_inner",
            ),
            IGNORED,
        ),
    },
    fixed={
        "norm": "layernorm",
        "position_embedding": "alibi",
        "embedding_norm": True,
        "activation": "gelu_tanh",
        "bias_in_query_key_value": True,
        "bias_in_dense": True,
        "bias_in_mlp": True,
    },
    prefix="transformer.",
    modules={
        "embedding": "transformer.word_embeddings",
        "embedding.norm": "transformer.word_embeddings_layernorm",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    layers="transformer.h",
    block={
        "input_norm": "input_layernorm",
        "attention.query_key_value": "self_attention.query_key_value",  # grouped by head, as ours
        "attention.dense": "self_attention.dense",
        "post_attention_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
)
