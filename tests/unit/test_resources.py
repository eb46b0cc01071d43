"""Weights are refused by a configuration that means another model, also where all shapes agree."""

import json
from pathlib import Path

import pytest

from megatron.config.load import config_from_flat
from megatron.config.resolve import resolve
from megatron.errors import UserError
from megatron.resources import BEHAVIOR_KEYS, check_same_model

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "pos_emb": "rotary",
    "load": "somewhere",
}


def check(tmp_path: Path, here: dict, there: dict) -> None:
    """Check a configuration against a checkpoint that another one wrote."""
    written = config_from_flat(MODEL | there).to_flat(with_defaults=True)
    (tmp_path / "config.json").write_text(json.dumps(written))
    check_same_model(resolve(config_from_flat(MODEL | here), 1, 257, inference=True).model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 1},
        {"no_weight_tying": True},
        {"use_bias_in_mlp": False},
        {"use_bias_in_attn_linear": False},
        {"use_bias_in_qkv": False},
        {"rotary_pct": 0.5},
        {"rotary_emb_base": 500000},
        {"pos_emb": "none"},
        {"num_attention_heads": 8},
        {"layernorm_epsilon": 1e-6},
        {"norm_bias": False},
        {"norm_placement": "both"},
        {"qk_norm": "each_head"},
        {"residual_multiplier": 0.5},
        {"activation": "gelu_tanh"},
        {"gpt_j_residual": True},
        {"attention_config": [[["global", "local"], 1]], "sliding_window_width": 4},
        {"attention_scale": 1.0},
        {"attn_logit_softcapping": 50.0},
        {"clip_qkv": 8.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_setting_that_changes_what_the_weights_compute_is_an_error_that_names_it(tmp_path, change):
    with pytest.raises(UserError, match="holds another model") as raised:
        check(tmp_path, here=change, there={})
    named = next(iter(change)).replace("layernorm_epsilon", "the norm's epsilon")
    assert any(named in problem for problem in raised.value.problems)
    check(tmp_path, here=change, there=change)


@pytest.mark.parametrize(
    "change",
    [
        {"model_parallel_size": 2, "pipe_parallel_size": 2},
        {"train_batch_size": 7},
        {"hidden_dropout": 0.1},
        {"precision": "bfloat16"},
        {"attention_config": [[["flash"], "all"]]},
        {"init_method": "small_init"},
        {"rms_norm_epsilon": 1e-3},
        {"attention_scale": 8**-0.5},  # the default for heads of 8
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_change_the_function_may_differ(tmp_path, change):
    check(tmp_path, here={}, there=change)


@pytest.mark.parametrize("ids", [270, 300])
def test_the_number_of_ids_is_left_to_the_shapes_of_the_weights(tmp_path, ids):
    """Whose message has both numbers."""
    check(tmp_path, here={"vocab_size": ids}, there={"vocab_size": 280, "padded_vocab_size": 290})


def test_every_setting_that_is_compared_is_one_of_the_plan():
    plan = resolve(config_from_flat(MODEL), 1, 257, inference=True).model
    assert {field for field in BEHAVIOR_KEYS if not hasattr(plan, field)} == {"local_layers"}


def test_what_the_other_run_used_besides_the_model_need_not_be_known_here(tmp_path):
    """Such as its plugins, which are not imported because a file says so, and the names they brought."""
    written = {"plugins": ["not_here"], "optimizer": {"type": "of_that_plugin"}, "tokenizer_type": "of_that_plugin"}
    (tmp_path / "config.json").write_text(json.dumps(MODEL | written))
    model = resolve(config_from_flat(MODEL), 1, 257, inference=True).model
    check_same_model(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL | {"a_newer_key": 1}))
    with pytest.raises(UserError, match="a_newer_key"):
        check_same_model(model, tmp_path)
