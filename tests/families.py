"""Small models of every Hugging Face family: settings of a transformers configuration, by family and variant.

Sizes are odd on purpose: 6 heads, 2 or 3 key/value heads, a vocabulary that needs padding, windows shorter than the
text. The first variant of a family is the usual one.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from megatron import registry
from megatron.config.load import config_from_flat
from megatron.config.resolve import resolve
from megatron.config.widths import round_up
from megatron.convert.family import KIND, Family, families_for, family_of
from megatron.convert.model_keys import model_keys
from tests.models import random_tensor, random_tokens, spread
from tests.ranks.family_checks import Figures, Reference, measure
from tests.ranks.run import run_ranks

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

YARN = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 2.375, "original_max_position_embeddings": 8}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 50.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
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
    "gptj": {"GPT-J": {**GPT2, "n_embd": 48, "n_head": 6, "rotary_dim": 4}},
    "gpt_neo": {
        "windows in every second layer": {
            "vocab_size": 61,
            "hidden_size": 48,
            "num_layers": 4,
            "num_heads": 6,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 5,
            "max_position_embeddings": LENGTH,
        },
    },
    "opt": {
        "OPT": {**UNGATED, "ffn_dim": 86, "word_embed_proj_dim": 48},
        "gelu, without biases": {
            **UNGATED,
            "ffn_dim": 86,
            "word_embed_proj_dim": 48,
            "activation_function": "gelu",
            "enable_bias": False,
        },
    },
    "bloom": {"BLOOM": {"vocab_size": 61, "hidden_size": 48, "n_layer": 3, "n_head": 6, "seq_length": LENGTH}},
    "falcon": {
        "Falcon-7B: one key/value head": {**UNGATED, "multi_query": True},
        "Falcon-40B: two norms, groups": {**UNGATED, "new_decoder_architecture": True, "num_kv_heads": 2},
        "Falcon 11B: one norm, groups": {
            **UNGATED,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
        "Falcon-RW: alibi, serial, biases": {
            **UNGATED,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    },
    "mpt": {
        "MPT-7B": {"vocab_size": 61, "d_model": 48, "n_heads": 6, "n_layers": 3, "max_seq_len": LENGTH},
        "clamped, another scale": {
            "vocab_size": 61,
            "d_model": 48,
            "n_heads": 6,
            "n_layers": 3,
            "max_seq_len": LENGTH,
            "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2},
        },
    },
    "llama": {
        "grouped queries": {**GROUPED, "rms_norm_eps": 1e-3},
        "one key/value head": {**SIZES, "num_key_value_heads": 1},
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
        "YaRN": {**GROUPED, "rope_parameters": YARN},
        "dynamic scaling, within the trained positions": {
            **GROUPED,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
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
    "phi": {
        "Phi-2": {**SIZES, "rope_parameters": PARTIAL},
        "queries and keys normalized, groups": {**GROUPED, "rope_parameters": PARTIAL, "qk_layernorm": True},
    },
    "phi3": {
        "Phi-3: windows": {**GROUPED, "sliding_window": 5},
        "Phi-4-mini: three quarters of each head rotated, tied": {
            **GROUPED,
            "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
        "LongRoPE, beyond the trained positions": {
            **GROUPED,
            "original_max_position_embeddings": 8,
            "rope_parameters": LONG,
        },
        "LongRoPE, within the trained positions": {
            **GROUPED,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONG,
        },
    },
    "gemma": {"Gemma": {**GROUPED, "head_dim": 16}},
    "gemma2": {
        "Gemma 2: windows, caps, another scale": {
            **GROUPED,
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
        "without caps": {
            **GROUPED,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 5,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    },
    "gemma3_text": {
        "Gemma 3: windows with another base": {
            **GROUPED,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 12,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    },
    "olmo": {
        "OLMo": SIZES,
        "clamped, groups, tied": {**GROUPED, "clip_qkv": 0.5, "tie_word_embeddings": True},
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
        "parallel residual, queries and keys normalized": {
            **GROUPED,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "rope_parameters": PARTIAL,
        },
    },
    "smollm3": {"SmolLM 3": {**GROUPED, "num_hidden_layers": 4}},
    "cohere": {
        "Command R": GROUPED,
        "Command R+: queries and keys normalized": {**GROUPED, "use_qk_norm": True, "logit_scale": 0.8},
    },
    "granite": {
        "Granite": {
            **GROUPED,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 7.0,
        }
    },
}


class Case(NamedTuple):
    """A small model."""

    family: str
    variant: str

    def __str__(self) -> str:
        return f"{self.family}-{self.variant}"


ALL = [Case(family, variant) for family, variants in CASES.items() for variant in variants]
FIRST = {family: Case(family, next(iter(variants))) for family, variants in CASES.items()}
PIPELINES = [FIRST[family] for family in ("gpt2", "llama", "gemma2", "bloom") if family in FIRST]


def their_config(case: Case) -> transformers.PretrainedConfig:
    """The configuration of a small model."""
    no_ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}  # which a small vocabulary has not
    config = transformers.CONFIG_MAPPING[case.family](**CASES[case.family][case.variant], **no_ids)
    # their eager attention adds Falcon's alibi twice
    config._attn_implementation = "sdpa" if getattr(config, "alibi", False) else "eager"
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


def reference(case: Case) -> Reference:
    """A small model of theirs, with what it computes for random tokens."""
    config = their_config(case)
    theirs, table = their_model(config), family_named(case.family)
    model = table.model(config.to_dict())
    model = replace(model, padded_vocab_size=round_up(model.vocab_size, 8))
    tokens, labels = (random_tokens(model, batch=2, length=LENGTH, seed=seed) for seed in (5, 6))
    logits = theirs(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    state = table.parameters(model).from_hugging_face({n: t.detach() for n, t in theirs.state_dict().items()})
    return Reference(case.family, model, state, tokens, labels, logits.detach(), loss.detach(), gradients)


class Measurements:
    """What ranks measure of small models, for each number of ranks once: a process start each."""

    def __init__(self, folder: Path, cases: Sequence[Case]) -> None:
        self.folder, self.numbers = folder, {case: str(number) for number, case in enumerate(cases)}
        for case, number in self.numbers.items():
            torch.save(reference(case), folder / f"{number}.pt")
        self.known: set[tuple[int, int]] = set()

    def of(self, case: Case, ranks: int, pipe: int = 1) -> Figures:
        """The figures of a model on `ranks` ranks, which are stages of a pipeline or tensor-parallel.

        Raises AssertionError with the traceback of a model that cannot be computed.
        """
        if (ranks, pipe) not in self.known:
            self.known.add((ranks, pipe))
            chosen = [number for case, number in self.numbers.items() if pipe == 1 or case in PIPELINES]
            run_ranks(ranks, measure, str(self.folder), chosen, pipe, timeout=60 + 5 * len(chosen))
        found = json.loads(Path(self.folder, f"{self.numbers[case]}.{pipe}.{ranks}.json").read_text())
        assert "error" not in found, found["error"]
        return found


def check_weights_return(case: Case) -> None:
    """Their weights become ours and theirs again, bit by bit."""
    config = their_config(case)
    theirs = dict(their_model(config).named_parameters())  # a tied weight once
    table = family_named(case.family)
    parameters = table.parameters(table.model(config.to_dict()))
    ours = parameters.from_hugging_face(theirs)
    back = parameters.to_hugging_face(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) and back[name].is_contiguous() for name in theirs)
    again = parameters.from_hugging_face(back)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def check_settings_return(case: Case) -> None:
    """Their settings become a model of ours, our keys and the same model, and theirs and the same model."""
    family = family_named(case.family)
    model = family.model(their_config(case).to_dict())
    config = family.config(model)
    assert json.loads(json.dumps(config)) == config
    assert family_of(config).model(config) == model
    assert case.family in [found.model_type for found in families_for(model)]
    keys = {**model_keys(model), "make_vocab_size_divisible_by": 1}
    assert resolve(config_from_flat(keys), 1, model.vocab_size).model == model
