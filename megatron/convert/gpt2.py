"""Map Hugging Face's GPT2LMHeadModel to our GPT."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.convert.maps import (
    Entry,
    ParameterMap,
    named_as,
    require,
    same,
    separate_heads,
    transposed,
    weight_and_bias,
)
from megatron.errors import UserError

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # buffers of older versions, and the tied head


def model_keys(config: Any) -> dict[str, Any]:
    """Our configuration keys for a transformers.GPT2Config. Raises UserError for unsupported settings."""
    expected = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    problems = [f"{key} must be {value} here" for key, value in expected.items() if getattr(config, key) != value]
    if problems:
        raise UserError(*problems)
    return {
        "num_layers": config.n_layer,
        "hidden_size": config.n_embd,
        "num_attention_heads": config.n_head,
        "ffn_hidden_size": config.n_inner or 4 * config.n_embd,
        "seq_length": config.n_positions,
        "max_position_embeddings": config.n_positions,
        "norm": "layernorm",
        "layernorm_epsilon": config.layer_norm_epsilon,
        "pos_emb": "learned",
        "activation": named_as(ACTIVATIONS, config.activation_function, "activation_function"),
        "gpt_j_residual": False,
        "no_weight_tying": False,
        "use_bias_in_attn_linear": True,
        "use_bias_in_mlp": True,
    }


def parameter_map(model: ModelPlan) -> ParameterMap:
    """The map of all parameters. Raises UserError for a model that GPT2LMHeadModel cannot hold."""
    require(
        model,
        "GPT-2",
        norm=["layernorm"],
        position_embedding=["learned"],
        activation=sorted(set(ACTIVATIONS.values())),
        num_kv_heads=[model.num_attention_heads],
        head_size=[model.hidden_size // model.num_attention_heads],
        parallel_residual=[False],
        tied_embeddings=[True],
        bias_in_query_key_value=[True],
        bias_in_dense=[True],
        bias_in_mlp=[True],
    )
    entries = [
        same("embedding.weight", "transformer.wte.weight"),
        same("embedding.positions.weight", "transformer.wpe.weight"),
    ]
    for index in range(model.num_layers):
        entries += _block(f"blocks.{index}", f"transformer.h.{index}", model)
    return ParameterMap([*entries, *weight_and_bias(same, "final_norm", "transformer.ln_f", True)], IGNORED)


def _block(ours: str, theirs: str, model: ModelPlan) -> list[Entry]:
    return [
        *weight_and_bias(same, f"{ours}.input_norm", f"{theirs}.ln_1", True),
        *(
            _fused_heads(f"{ours}.attention.query_key_value", f"{theirs}.attn.c_attn", kind, model)
            for kind in ("weight", "bias")
        ),
        *weight_and_bias(transposed, f"{ours}.attention.dense", f"{theirs}.attn.c_proj", True),
        *weight_and_bias(same, f"{ours}.post_attention_norm", f"{theirs}.ln_2", True),
        *weight_and_bias(transposed, f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", True),
        *weight_and_bias(transposed, f"{ours}.mlp.down", f"{theirs}.mlp.c_proj", True),
    ]


def _fused_heads(ours: str, theirs: str, kind: str, model: ModelPlan) -> Entry:
    """Their fused tensor: all queries, all keys, all values along the last dimension."""
    heads = separate_heads(f"{ours}.{kind}", ("query", "key", "value"), model)

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return heads.join(tensors[0].t().chunk(3) if kind == "weight" else tensors[0].chunk(3))

    def split(tensor: Tensor) -> Sequence[Tensor]:
        fused = torch.cat(list(heads.split(tensor)))
        return (fused.t() if kind == "weight" else fused,)

    return Entry(heads.ours, (f"{theirs}.{kind}",), join, split)
