"""What the tables of Hugging Face families refuse: nothing is ignored that changes what a model computes."""

from dataclasses import replace

import pytest
import torch

from megatron import registry
from megatron.config.plan import ModelPlan, RopeScaling
from megatron.convert.family import KIND, families_for, family_of
from megatron.convert.model_keys import attention_config, model_keys
from megatron.convert.parameters import tensors_around_the_blocks, tensors_of_a_block
from megatron.errors import UserError
from megatron.model.gpt import gpt_layers
from tests.end_to_end.commands import ROOT
from tests.families import CASES, FIRST, LENGTH, family_named, their_config, their_model
from tests.models import VARIETY, small
from tests.ranks.run import one_rank


def plan_of(family: str, **changes) -> ModelPlan:
    """Our plan of the first small model of a family."""
    return replace(family_named(family).model(their_config(FIRST[family]).to_dict()), **changes)


def settings_of(family: str) -> dict:
    """The settings of the first small model of a family."""
    return CASES[family][FIRST[family].variant]


@pytest.mark.parametrize("name", VARIETY)
def test_the_names_of_our_parameters_are_those_of_the_model(name):
    model = VARIETY[name]
    with one_rank() as grid:
        built = {
            parameter.global_name for layer in gpt_layers(model, grid, None) for parameter in layer.build().parameters()
        }
    inside = {
        f"blocks.{layer}.{module}": kinds
        for layer in range(model.num_layers)
        for module, kinds in tensors_of_a_block(model).items()
    }
    named = tensors_around_the_blocks(model) | inside
    assert {f"{module}.{kind}" for module, kinds in named.items() for kind in kinds} == built


def test_a_weight_that_is_missing_or_has_no_place_is_named():
    state = their_model(their_config(FIRST["llama"])).state_dict()
    state["model.layers.0.mlp.up_proj.bias"] = torch.zeros(86)
    del state["model.norm.weight"]
    with pytest.raises(UserError) as raised:
        family_named("llama").parameters(plan_of("llama")).from_hugging_face(state)
    assert raised.value.problems == (
        "model.norm.weight: not among the stored tensors",
        "model.layers.0.mlp.up_proj.bias: has no counterpart in our model",
    )


def test_names_without_their_prefix_and_buffers_of_older_versions_are_understood():
    whole = their_model(their_config(FIRST["gpt2"])).state_dict()
    parameters = family_named("gpt2").parameters(plan_of("gpt2"))
    short = {name.removeprefix("transformer."): tensor for name, tensor in whole.items() if name != "lm_head.weight"}
    short["h.0.attn.bias"] = torch.ones(19, 19)
    ours, again = parameters.from_hugging_face(whole), parameters.from_hugging_face(short)
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (
            "llama",
            {"parallel_residual": True},
            "Llama cannot hold this model: parallel_residual would be False, not True",
        ),
        ("llama", {"activation": "gelu"}, "Llama cannot hold this model: activation must be 'swiglu' or 'geglu'"),
        ("llama", {"layers_without_rotary": (2,)}, r"layers_without_rotary would be \(\), not \(2,\)"),
        ("gpt_neox", {"qk_norm": "head"}, "GPT-NeoX cannot hold this model: qk_norm would be None, not 'head'"),
        ("gpt_neox", {"head_size": 10}, "head_size would be 8, not 10"),
        ("olmo2", {"norm_placement": "input"}, "norm_placement would be 'output', not 'input'"),
        ("gpt2", {"bias_in_mlp": False}, "GPT-2 cannot hold this model: bias_in_mlp would be True, not False"),
        (
            "gpt2",
            {"attention_kinds": ("global", "local", "global"), "sliding_window": 4},
            r"attention_kinds would be \('global', 'global', 'global'\)",
        ),
    ],
)
def test_a_model_that_an_architecture_cannot_hold_is_refused(family, changes, message):
    with pytest.raises(UserError, match=message):
        family_named(family).config(plan_of(family, **changes))


def test_what_has_no_effect_is_no_reason_to_refuse():
    model = plan_of("gpt2", rotary_base=500.0, init_std=0.1, hidden_dropout=0.1, attention_kinds=("flash",) * 3)
    config = family_named("gpt2").config(model)
    assert (config["resid_pdrop"], config["attn_pdrop"]) == (0.1, 0.0)


def test_all_that_a_configuration_says_and_we_cannot_hold_is_named_at_once():
    config = {
        **settings_of("gpt2"),
        "scale_attn_weights": False,
        "activation_function": "quick_gelu",
        "is_encoder_decoder": True,
        "quantization_config": {"quant_method": "gptq"},
    }
    with pytest.raises(UserError) as raised:
        family_named("gpt2").model(config)
    assert sorted(raised.value.problems) == [
        "config.json of GPT-2: activation_function 'quick_gelu' has no counterpart here; known: "
        "gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu, silu, swish",
        "config.json of GPT-2: is_encoder_decoder True is not known here, and not at its default (False)",
        "config.json of GPT-2: quantization_config {'quant_method': 'gptq'} is not known here",
        "config.json of GPT-2: scale_attn_weights must be True here, not False",
    ]


# What published files hold beside the fields of transformers' class, from other programs and older versions.
STRAY = {
    "gpt2": {"n_special": 0, "predict_special_tokens": True},
    "gpt_neox": {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "llama": {"is_llama_config": True, "rope_interleaved": False, "max_sequence_length": 2048},
    "mpt": {"tokenizer_name": "EleutherAI/gpt-neox-20b", "verbose": 0},
    "falcon": {"apply_residual_connection_post_layernorm": False},
    "phi3": {"attention_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1},
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": {"cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"},
    "qwen2": {"use_mrope": False, "head_dim": 8},
    "starcoder2": {"mlp_type": "default", "norm_type": "layer_norm", "attention_softmax_in_fp32": True},
    "cohere": {"model_max_length": 131072},
}


@pytest.mark.parametrize("family", STRAY)
def test_what_transformers_does_not_read_changes_nothing_here(family):
    table = family_named(family)
    assert table.model({**settings_of(family), **STRAY[family]}) == table.model(settings_of(family))


def test_a_size_of_heads_that_transformers_reads_without_declaring_it_is_refused():
    with pytest.raises(UserError, match="head_dim 16 is not known here"):
        family_named("qwen2").model({**settings_of("qwen2"), "head_dim": 16})


SCALINGS = {
    "dynamic": ({"factor": 2.0}, RopeScaling("dynamic", 2.0, original_positions=LENGTH)),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 12, "beta_fast": 3.0, "truncate": False},
        RopeScaling("yarn", 4.0, original_positions=12, beta_fast=3.0, truncate=False),
    ),
    "longrope": (
        {"original_max_position_embeddings": 5, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]},
        RopeScaling(
            "longrope", LENGTH / 5, original_positions=5, short_factors=(1.0,) * 4, long_factors=(2.0, 3.0, 4.0, 5.0)
        ),
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaling_of_rotary_positions_is_read_and_written(kind):
    theirs, ours = SCALINGS[kind]
    rope = {"rope_type": kind, "rope_theta": 1e4, **theirs}
    model = family_named("llama").model({**settings_of("llama"), "rope_parameters": rope})
    assert model.rope_scaling == ours
    written = family_named("llama").config(model)["rope_parameters"]
    assert rope.items() <= written.items()
    assert family_named("llama").model({**settings_of("llama"), "rope_parameters": written}).rope_scaling == ours


def test_dynamic_scaling_of_more_positions_is_not_exported():
    model = plan_of("llama", rope_scaling=RopeScaling("dynamic", 2.0, original_positions=8))
    with pytest.raises(UserError, match=r"8, which in a config\.json is max_position_embeddings, not 19"):
        family_named("llama").config(model)


def test_an_unknown_rope_type_is_refused():
    rope = {"rope_type": "mrope", "rope_theta": 1e4}
    with pytest.raises(UserError, match="rope_type 'mrope' has no counterpart here; known: default, linear"):
        family_named("llama").model({**settings_of("llama"), "rope_parameters": rope})


def test_an_unknown_architecture_is_answered_with_the_nearest_one():
    with pytest.raises(UserError, match=r'unknown hugging face family "qwen4"\. Did you mean "qwen\d"\?'):
        family_of({"model_type": "qwen4"})
    with pytest.raises(UserError, match=r"config\.json has no model_type; known: gpt2"):
        family_of({})


@pytest.mark.parametrize("family", registry.names(KIND))
def test_the_defaults_of_a_family_are_understood(family):
    """A published config.json leaves out what is at the default of transformers' class."""
    table = family_named(family)
    model = table.model({})
    assert table.model(table.config(model)) == model


def test_a_model_of_ours_finds_the_families_that_can_hold_it():
    assert [family.name for family in families_for(plan_of("qwen3"))] == ["Qwen 3"]
    assert families_for(small(norm="rmsnorm", position_embedding="learned")) == []


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("lll", [[["local"], 3]]),
        ("lglg", [[["local", "global"], 2]]),
        ("gggll", [[["global", "global", "global", "local", "local"], 1]]),
        ("llgllgl", [[["local", "local", "global"], 2], [["local"], 1]]),
    ],
)
def test_kinds_of_layers_become_the_shortest_pattern(kinds, pattern):
    names = {"l": "local", "g": "global"}
    assert attention_config(tuple(names[kind] for kind in kinds)) == pattern


def test_layers_without_rotary_in_no_interval_are_refused():
    with pytest.raises(UserError, match="layers 0 have no rotary positions"):
        model_keys(small(layers_without_rotary=(0,)))
    assert model_keys(small(layers_without_rotary=(2,)))["no_rope_layer_interval"] == 3


def test_the_page_on_models_has_a_row_for_each_family():
    rows = (ROOT / "docs" / "models.md").read_text().splitlines()
    for family, variants in CASES.items():
        table = family_named(family)
        assert any(row.startswith(f"| {table.name} | `{family}` | {len(variants)} |") for row in rows), family
    assert len([row for row in rows if row.startswith("| ") and "e-" in row]) == len(CASES)
