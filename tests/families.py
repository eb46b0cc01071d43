"""Small models of every Hugging Face family: settings of a transformers configuration, by family and variant.

Sizes are odd on purpose: 6 heads, 2 or 3 key/value heads, a vocabulary that needs padding, windows shorter than the
text. The first variant of a family is the usual one.
"""

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn

from megatron import registry
from megatron.config.widths import round_up
from megatron.convert.family import KIND, Family
from tests.models import random_tensor, random_tokens, spread
from tests.ranks.family_checks import Reference

LENGTH = 19
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 86,
    "max_position_embeddings": LENGTH,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 101, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_inner": 70, "n_positions": LENGTH}

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 20.0,
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
WINDOWS = {"use_sliding_window": True, "sliding_window": 5}

UNGATED = {name: size for name, size in SIZES.items() if name != "intermediate_size"}

Settings = dict[str, Any]

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

# family -> variant -> arguments of its configuration class
CASES: dict[str, dict[str, Settings]] = {
    "gpt2": {
        "GPT-2": GPT2,
        "default width, relu": {**GPT2, "n_inner": None, "activation_function": "relu"},
        "untied": {**GPT2, "tie_word_embeddings": False},
    },
    "gpt_neox": {
        "Pythia: parallel residual, a quarter of each head rotated": SIZES,
        "serial residual, whole heads rotated, tied, another base": {
            **SIZES,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
        },
        "no biases in attention, tanh gelu, another epsilon": {
            **SIZES,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-2,
        },
    },
    "llama": {
        "grouped queries": {**GROUPED, "rms_norm_eps": 1e-3},
        "Llama 1: biases, tied, another base": {
            **SIZES,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
        },
        "Llama 3.1: wavelengths stretched, kept and between": {
            **GROUPED,
            "hidden_size": 96,
            "rope_parameters": LLAMA_3_1,
        },
        "positions stretched, heads of another size": {**GROUPED, "head_dim": 10, "rope_parameters": LINEAR},
    },
    "mistral": {
        "windows in all layers": {**GROUPED, "head_dim": 8, "sliding_window": 5},
        "no windows": {**GROUPED, "head_dim": 12, "sliding_window": None},
    },
    "qwen2": {
        "Qwen 2.5": GROUPED,
        "windows in the last layers, tied": {**GROUPED, **WINDOWS, "max_window_layers": 1, "tie_word_embeddings": True},
    },
    "qwen3": {
        "heads wider than the hidden size, tied": {
            **GROUPED,
            "head_dim": 16,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
        "windows in the last layers, biases": {
            **GROUPED,
            **WINDOWS,
            "head_dim": 8,
            "max_window_layers": 2,
            "attention_bias": True,
        },
    },
    "phi3": {
        "Phi-3: windows": {**GROUPED, "sliding_window": 5},
        "Phi-4-mini: three quarters of each head rotated, tied": {
            **GROUPED,
            "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    },
    "olmo": {
        "OLMo": SIZES,
    },
    "olmo2": {
        "grouped queries": {**GROUPED, "rms_norm_eps": 1e-3},
        "without groups, with biases": {**SIZES, "attention_bias": True},
    },
    "starcoder2": {
        "StarCoder 2: windows": {**GROUPED, "sliding_window": 5},
        "untied, without biases": {**GROUPED, "use_bias": False, "tie_word_embeddings": False},
    },
    "stablelm": {
        "StableLM 2: biases in queries, keys and values": {**GROUPED, "use_qkv_bias": True, "rope_parameters": PARTIAL},
    },
}


def their_config(family: str, settings: Settings) -> transformers.PretrainedConfig:
    """The configuration of a small model."""
    config = transformers.CONFIG_MAPPING[family](**settings, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "eager"
    return config


def their_model(config: transformers.PretrainedConfig) -> nn.Module:
    """A model of theirs with random values in every parameter, in fp32."""
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            parameter.copy_(spread(name, random_tensor(parameter.shape, index)))
    return model


def family_named(name: str) -> Family:
    """The table of a family."""
    family: Family = registry.resolve(KIND, name)
    return family


def reference(family: str, settings: Settings) -> Reference:
    """A small model of theirs, with what it computes for random tokens."""
    config = their_config(family, settings)
    theirs, table = their_model(config), family_named(family)
    model = table.model(config.to_dict())
    model = replace(model, padded_vocab_size=round_up(model.vocab_size, 8))
    tokens, labels = (random_tokens(model, batch=2, length=LENGTH, seed=seed) for seed in (5, 6))
    logits = theirs(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    state = {
        name: tensor.detach() for name, tensor in table.parameters(model).from_hugging_face(theirs.state_dict()).items()
    }
    return Reference(family, model, state, tokens, labels, logits.detach(), loss.detach(), gradients)
