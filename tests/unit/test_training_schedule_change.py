"""Resuming with another schedule or batch size is allowed, and said in one line."""

from dataclasses import replace

import pytest

from megatron.checkpoint.state import TrainState
from megatron.config.load import config_from_flat
from megatron.config.resolve import schedule_of
from megatron.training.schedule_change import resumed_changes
from tests import tiny

FLAT = {
    "data_impl": "mock",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "train_batch_size": 8,
    "train_iters": 100,
    "warmup": 0.1,
    "min_lr": 1e-5,
    "tokenizer_type": "CharLevelTokenizer",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
}


def changes(here: dict, there: dict | None = None, state: TrainState | None = None) -> list[str]:
    config = config_from_flat(FLAT | here, "test")
    written = config_from_flat(FLAT | (there or {}), "test").to_flat(with_defaults=True)
    batch = replace(tiny.plan().batch, global_size=config.batch.train_batch_size or 8)
    plan = replace(tiny.plan(), schedule=schedule_of(config), batch=batch)
    return resumed_changes(config, plan, written, state or TrainState(50, 400, 0))


def test_an_unchanged_run_resumes_without_a_word():
    assert changes({}) == []
    assert changes({"log_interval": 1, "seed": 3}) == []


def test_training_longer_tells_both_learning_rates_and_how_to_keep_the_old_one():
    # 1e-5 + 99e-5 * (1 - 40 / 90) and 1e-5 + 99e-5 * (1 - 30 / 180)
    assert changes({"train_iters": 200}) == [
        "another learning rate than before: at step 50 it is 0.000835 instead of 0.00056 (train_iters is 200, "
        "was 100); to keep the schedule: lr_decay_iters=100"
    ]


def test_the_override_that_the_message_names_keeps_the_schedule():
    assert changes({"train_iters": 200, "lr_decay_iters": 100}) == []
    kept = {"train_iters": 200, "lr_decay_iters": 50, "lr_decay_fraction": None}
    there = {"lr_decay_fraction": 0.5}
    assert changes(kept, there) == []
    (said,) = changes({"train_iters": 200, "lr_decay_fraction": 0.5}, there)
    assert said.endswith("to keep the schedule: lr_decay_iters=50 lr_decay_fraction=null")


@pytest.mark.parametrize(
    ("here", "there", "told", "kept"),
    [
        ({"warmup": 0.5}, {"warmup": 0.3}, "warmup is 0.5, was 0.3", "warmup=0.3"),
        (
            {"min_lr": 1e-4, "train_iters": 90, "lr_decay_iters": 70},
            {"lr_decay_iters": 70},
            "(min_lr is 0.0001, was 1e-05)",
            "min_lr=1e-05",
        ),
        ({"lr_decay_style": "cosine"}, {}, "lr_decay_style is cosine, was linear", "lr_decay_style=linear"),
        (
            {"optimizer": {"type": "Adam", "params": {"lr": 2e-3}}},
            {},
            "optimizer.params.lr is 0.002, was 0.001",
            "optimizer.params.lr=0.001",
        ),
        ({}, {"train_iters": 200, "lr_decay_iters": 50}, "lr_decay_iters is None, was 50", "=50"),
    ],
)
def test_every_key_of_the_schedule_is_told_with_both_values(here, there, told, kept):
    (said,) = changes(here, there)
    assert told in said and said.endswith(kept)


def test_a_schedule_that_gives_the_same_rates_for_the_rest_of_the_run_is_no_change():
    constant = {"lr_decay_style": "constant"}
    assert changes(constant | {"train_iters": 200}, constant) == []
    (said,) = changes(constant | {"train_iters": 1000}, constant)  # its warm-up lasts 100 steps
    assert "at step 50 it is 0.000505 instead of 0.001" in said


def test_a_rate_that_differs_only_later_is_told_where_it_does():
    (said,) = changes({"min_lr": 0.0}, {"lr_decay_iters": 50}, TrainState(5, 40, 0))
    assert "at step 5 it is" in said
    (said,) = changes({"lr_decay_iters": 80}, {"lr_decay_iters": 75}, TrainState(2, 16, 0))
    assert "at step 9 it is" in said, "both warm up alike over 8 steps"


def test_a_schedule_of_a_plugin_that_is_gone_is_told_too():
    config = config_from_flat(FLAT, "test")
    written = config.to_flat(with_defaults=True) | {"lr_decay_style": "mine"}
    plan = replace(tiny.plan(), schedule=schedule_of(config))
    (said,) = resumed_changes(config, plan, written, TrainState(50, 400, 0))
    assert said == "another learning rate than before: lr_decay_style is linear, was mine of a plugin"


def test_another_batch_size_is_told_by_configuration_or_by_what_was_read():
    expected = "a step is 16 samples instead of 8; train_iters and the learning rate count steps; to keep it: "
    (said,) = changes({"train_batch_size": 16})
    assert said.endswith(f"{expected}train_batch_size=8")
    micro = {"train_batch_size": None, "train_micro_batch_size_per_gpu": 4}
    (said,) = changes({"train_batch_size": 16}, micro, TrainState(50, 400, 0))
    assert said.endswith(f"{expected}train_batch_size=8")
    assert changes({"train_batch_size": 16}, micro, TrainState(50, 401, 0)) == [], "it has changed before"


def test_a_checkpoint_that_lacks_the_keys_is_no_error():
    config = config_from_flat(FLAT, "test")
    plan = replace(tiny.plan(), schedule=schedule_of(config))
    assert resumed_changes(config, plan, {}, TrainState()) == []
