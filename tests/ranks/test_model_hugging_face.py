"""Our logits equal those of transformers' GPTNeoX, GPT-2 and Llama, through the parameter maps, on 1 and 2 ranks.

Random values stand in every parameter, biases and norms too, and sizes are odd. fp32; both sides compute the same sums
in another order, so that 1e-4 of the largest logit is far above the gaps (2e-6) and far below any mistake.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from megatron.config.load import config_from_flat
from megatron.config.plan import ModelPlan
from megatron.config.resolve import resolve
from megatron.convert import gpt2, gpt_neox
from megatron.convert.llama import llama, olmo2, qwen3
from megatron.errors import UserError
from tests.models import random_tensor, random_tokens, spread
from tests.ranks.logits import assert_logits
from tests.ranks.run import run_ranks

NEOX = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 90,
    "max_position_embeddings": 19,
}
GPT2 = {"vocab_size": 101, "n_embd": 40, "n_layer": 3, "n_head": 4, "n_inner": 70, "n_positions": 19}
LLAMA = {**NEOX, "vocab_size": 101, "num_key_value_heads": 2, "intermediate_size": 86}

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 20.0,
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}

CASES: dict[str, tuple[Any, Any, Any]] = {
    "Pythia: parallel residual, a quarter of each head turned": (
        gpt_neox,
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(**NEOX, rotary_pct=0.25, use_parallel_residual=True),
    ),
    "GPT-NeoX: serial residual, whole heads turned, tied, another base": (
        gpt_neox,
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(
            **NEOX, rotary_pct=1.0, rotary_emb_base=500, use_parallel_residual=False, tie_word_embeddings=True
        ),
    ),
    "GPT-NeoX: no biases in attention, tanh gelu, another epsilon": (
        gpt_neox,
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(**NEOX, attention_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-2),
    ),
    "GPT-2": (gpt2, transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
    "GPT-2: default width, relu": (
        gpt2,
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**{**GPT2, "n_inner": None}, activation_function="relu"),
    ),
    "Llama: grouped queries, no biases": (
        llama,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**LLAMA, rms_norm_eps=1e-3),
    ),
    "Llama: biases, tied, another base": (
        llama,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **{**LLAMA, "num_key_value_heads": 6},
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        ),
    ),
    "Llama 3.1: wavelengths stretched, kept and between": (
        llama,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**LLAMA | {"hidden_size": 96}, rope_parameters=LLAMA_3_1),
    ),
    "Llama: positions stretched, heads of another size": (
        llama,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**LLAMA, head_dim=10, rope_parameters=LINEAR),
    ),
    "Qwen 3: each head normalised, heads wider than the hidden size, tied": (
        qwen3,
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**LLAMA, head_dim=16, rms_norm_eps=1e-3, tie_word_embeddings=True),
    ),
    "OLMo 2: all heads normalised together, norms on outputs": (
        olmo2,
        transformers.Olmo2ForCausalLM,
        transformers.Olmo2Config(**LLAMA, rms_norm_eps=1e-3),
    ),
    "OLMo 2: without groups, as published, with biases": (
        olmo2,
        transformers.Olmo2ForCausalLM,
        transformers.Olmo2Config(**LLAMA | {"num_key_value_heads": 6}, attention_bias=True),
    ),
}


def hugging_face_model(kind: type, config: Any) -> torch.nn.Module:
    """Their model with random values in every parameter."""
    config._attn_implementation = "eager"
    model = kind(config).eval().requires_grad_(False)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameter.copy_(spread(name, random_tensor(parameter.shape, index)))
    return model


def our_plan(architecture: Any, config: Any, tp: int = 1) -> ModelPlan:
    """What our own reading of their configuration comes to."""
    keys = {**architecture.model_keys(config), "model_parallel_size": tp, "make_vocab_size_divisible_by": 8}
    return resolve(config_from_flat(keys), tp, config.vocab_size).model


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tp):
    architecture, kind, config = CASES[case]
    theirs, model = hugging_face_model(kind, config), our_plan(architecture, config, tp)
    tokens = random_tokens(model, batch=2, length=model.max_position_embeddings)
    state = architecture.parameter_map(model).from_hugging_face(theirs.state_dict())
    run_ranks(tp, assert_logits, model, state, tokens, theirs(tokens).logits)


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_through_our_parameters_is_bit_exact(case):
    architecture, kind, config = CASES[case]
    theirs = dict(hugging_face_model(kind, config).named_parameters())  # a tied weight once
    parameter_map = architecture.parameter_map(our_plan(architecture, config))
    ours = parameter_map.from_hugging_face(theirs)
    back = parameter_map.to_hugging_face(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) and back[name].is_contiguous() for name in theirs)
    again = parameter_map.from_hugging_face(back)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_a_weight_that_is_missing_or_has_no_place_is_named():
    architecture, kind, config = CASES["Llama: grouped queries, no biases"]
    state = hugging_face_model(kind, config).state_dict()
    state["model.layers.0.mlp.up_proj.bias"] = torch.zeros(86)
    del state["model.norm.weight"]
    with pytest.raises(UserError) as raised:
        architecture.parameter_map(our_plan(architecture, config)).from_hugging_face(state)
    assert raised.value.problems == (
        "model.norm.weight: not in the Hugging Face model",
        "model.layers.0.mlp.up_proj.bias: has no counterpart in our model",
    )


@pytest.mark.parametrize(
    ("architecture", "case", "changes", "message"),
    [
        (
            llama,
            "Llama: grouped queries, no biases",
            {"parallel_residual": True},
            "Llama has no parallel_residual True",
        ),
        (gpt_neox, "Llama: grouped queries, no biases", {}, "GPTNeoX has no norm 'rmsnorm'"),
        (gpt_neox, next(iter(CASES)), {"qk_norm": "head"}, "GPTNeoX has no qk_norm 'head'"),
        (gpt_neox, next(iter(CASES)), {"head_size": 10}, "GPTNeoX has no head_size 10"),
        (qwen3, "Llama: grouped queries, no biases", {}, "Qwen3 has no qk_norm None"),
        (olmo2, "Llama: grouped queries, no biases", {"qk_norm": "full"}, "Olmo2 has no norm_placement 'input'"),
        (gpt2, "GPT-2", {"bias_in_mlp": False}, "GPT-2 has no bias_in_mlp False"),
        (gpt2, "GPT-2", {"attention_kinds": ("global", "local", "global")}, "GPT-2 has no local attention"),
    ],
)
def test_a_model_that_an_architecture_cannot_hold_is_refused(architecture, case, changes, message):
    source, _, config = CASES[case]
    with pytest.raises(UserError, match=message):
        architecture.parameter_map(replace(our_plan(source, config), **changes))


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        (
            llama,
            transformers.LlamaConfig(
                **LLAMA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "rope_type 'dynamic' has no counterpart",
        ),
        (gpt_neox, transformers.GPTNeoXConfig(**NEOX, hidden_act="mish"), "hidden_act 'mish' has no counterpart"),
        (gpt2, transformers.GPT2Config(**GPT2, scale_attn_weights=False), "scale_attn_weights must be True"),
    ],
)
def test_a_configuration_that_we_cannot_express_is_refused(architecture, config, message):
    with pytest.raises(UserError, match=message):
        architecture.model_keys(config)
