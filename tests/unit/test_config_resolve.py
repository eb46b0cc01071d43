"""What a configuration comes to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.config.load import config_from_flat
from megatron.config.plan import BatchPlan, Layout, LossScalePlan
from megatron.config.resolve import resolve
from megatron.engine.settings import deepspeed_settings
from megatron.registry import names

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8}


def plan(world_size=1, vocab_size=1000, inference=False, **keys):
    return resolve(config_from_flat(SHAPE | keys), world_size, vocab_size, inference=inference)


def test_what_is_left_of_the_ranks_is_data_parallel():
    assert plan(8, pipe_parallel_size=2, model_parallel_size=2).layout == Layout(8, pipe=2, data=2, tensor=2)
    assert plan(8, context_parallel_size=2, model_parallel_size=2).layout == Layout(8, 1, data=2, tensor=2, context=2)
    assert plan(2, sequence_parallel=True).layout == Layout(2, 1, 2, 1), "it needs tensor parallelism"
    assert plan(2, pipe_parallel_size=0).layout == plan(2, pipe_parallel_size=1).layout == Layout(2, 1, 2, 1)


def test_reading_a_model_takes_no_pipeline():
    keys = {"pipe_parallel_size": 2, "model_parallel_size": 2, "train_batch_size": 7}
    found = plan(2, inference=True, **keys)
    assert found.layout == Layout(2, pipe=1, data=1, tensor=2)
    cut = plan(2, inference=True, context_parallel_size=2, model_parallel_size=2, sequence_parallel=True)
    assert cut.layout == found.layout
    assert found.batch.micro_size == 1


def test_ranks_that_do_not_divide_are_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"6 ranks cannot be divided by .* \(2\) x .* \(2\); num_gpus 4"):
        plan(6, pipe_parallel_size=2, model_parallel_size=2)


@pytest.mark.parametrize(
    ("keys", "batch"),
    [
        ({"train_batch_size": 16}, (4, 1, 16)),
        ({"train_micro_batch_size_per_gpu": 2}, (2, 1, 8)),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, (2, 3, 24)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, (2, 2, 16)),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 4}, (1, 4, 16)),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}, (2, 2, 16)),
    ],
)
def test_two_batch_sizes_give_the_third_and_one_means_no_accumulation(keys, batch):
    assert plan(4, **keys).batch == BatchPlan(*batch, sequence_length=8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_batch_size": 6}, r"train_batch_size \(6\) must be divisible by .* \(1\) x 4 .* = 4; 8 would work"),
        ({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 3}, r"by train_micro_batch_size_per_gpu \(3\) x 4"),
        (
            {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
            r"train_batch_size \(16\) is not .* \(2\) x .*\(3\) x 4 data-parallel replicas = 24",
        ),
    ],
)
def test_batch_sizes_that_contradict_each_other_are_refused_with_all_values(keys, message):
    with pytest.raises(ConfigError, match=message):
        plan(4, **keys)


@given(micro=st.integers(1, 9), steps=st.integers(1, 9), data=st.integers(1, 9), left_out=st.integers(0, 3))
def test_any_two_sizes_give_the_same_batch_as_all_three(micro, steps, data, left_out):
    keys = {
        "train_batch_size": micro * steps * data,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
    }
    kept = {key: value for index, (key, value) in enumerate(keys.items()) if index != left_out}
    assert plan(data, **kept).batch == BatchPlan(micro, steps, micro * steps * data, 8)


def test_the_vocabulary_is_padded_to_a_multiple_whatever_the_layout():
    assert plan(vocab_size=1000).model.padded_vocab_size == 1024
    assert plan(2, vocab_size=1000, model_parallel_size=2).model.padded_vocab_size == 1024
    assert plan(vocab_size=1000, padded_vocab_size=1001).model.padded_vocab_size == 1001


def test_a_vocabulary_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"the tokenizer has 1000 ids, more than padded_vocab_size \(999\)"):
        plan(vocab_size=1000, padded_vocab_size=999)


def test_a_model_may_know_more_ids_than_its_tokenizer_but_not_fewer():
    def model(ids, **keys):
        return resolve(config_from_flat(SHAPE | {"vocab_size": 130} | keys), 1, ids).model

    assert (model(101).vocab_size, model(101).padded_vocab_size) == (130, 256)
    with pytest.raises(ConfigError, match=r"the tokenizer has 131 ids, more than vocab_size \(130\)"):
        model(131)
    with pytest.raises(ConfigError, match=r"vocab_size means 130 ids, more than padded_vocab_size \(128\)"):
        model(100, padded_vocab_size=128)


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({}, 192),
        ({"activation": "swiglu"}, 128),
        ({"activation": "swiglu", "hidden_size": 4096, "num_attention_heads": 32, "mlp_multiple_of": 256}, 11008),
        ({"intermediate_size": 100}, 100),
        ({"ffn_hidden_size": 100, "activation": "geglu"}, 100),
    ],
)
def test_the_feed_forward_width_is_the_true_one(keys, width):
    assert plan(**keys).model.ffn_hidden_size == width


def test_attention_kinds_are_dealt_to_layers():
    keys = {"sliding_window_width": 3}
    assert plan().model.attention_kinds == ("global",) * 4
    repeated = plan(attention_config=[[["global", "local"], "all"]], **keys)
    assert repeated.model.attention_kinds == ("global", "local") * 2
    listed = plan(attention_config=[[["local", "global"], 1], [["flash"], 2]], **keys)
    assert listed.model.attention_kinds == ("local", "global", "flash", "flash")


def test_the_epsilon_is_that_of_the_norm():
    keys = {"layernorm_epsilon": 1e-3, "rms_norm_epsilon": 1e-4, "scalenorm_epsilon": 1e-6}
    epsilons = {name: plan(norm=name, **keys).model.norm_epsilon for name in names("norm")}
    assert epsilons == {
        "layernorm": 1e-3,
        "non_parametric_layernorm": 1e-3,
        "rmsnorm": 1e-4,
        "rmsnorm_1p": 1e-4,
        "scalenorm": 1e-6,
    }


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        ({}, "fp32"),
        ({"precision": "bfloat16"}, "bf16"),
        ({"precision": "fp16"}, "fp16"),
        ({"fp16": {"fp16": True}}, "fp16"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "bf16"),
        ({"fp16": {"type": "bfloat16"}, "precision": "bfloat16"}, "bf16"),
        ({"fp16": {"enabled": False, "type": "bfloat16"}}, "fp32"),
        ({"bf16": {"bf16": True}}, "bf16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "fp32"),
    ],
)
def test_the_ways_to_ask_for_a_precision_mean_the_same(keys, precision):
    assert plan(**keys).engine.precision == precision


def test_the_loss_scale_is_there_for_fp16_only():
    assert plan().engine.loss_scale is None
    dynamic = plan(fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1}).engine.loss_scale
    assert dynamic == LossScalePlan(dynamic=True, initial=16.0, window=1000, hysteresis=1, minimum=1.0)
    static = plan(fp16={"enabled": True, "loss_scale": 128}).engine.loss_scale
    assert (static.dynamic, static.initial) == (False, 128)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [({}, (1, 100)), ({"lr_decay_iters": 50, "warmup": 0.1}, (5, 50)), ({"lr_decay_fraction": 0.4}, (0, 40))],
)
def test_the_schedule_is_counted_in_steps(keys, steps):
    schedule = plan(train_iters=100, **keys).schedule
    assert (schedule.warmup_steps, schedule.decay_steps) == steps


def test_optimizer_and_engine_take_their_values_from_where_they_are_written():
    found = plan(
        world_size=2,
        optimizer={"type": "SGD", "params": {"lr": 0.5, "betas": [0.9, 0.99], "weight_decay": 0.3}},
        min_lr=0.25,
        zero_optimization={"stage": 1, "reduce_bucket_size": 5e8, "allgather_bucket_size": 7},
        checkpoint_activations=True,
        checkpoint_num_layers=2,
    )
    assert (found.optimizer.kind, found.optimizer.learning_rate, found.optimizer.weight_decay) == ("sgd", 0.5, 0.3)
    assert (found.schedule.peak, found.schedule.minimum) == (0.5, 0.25)
    assert (found.engine.zero_stage, found.engine.zero_options) == (1, {"allgather_bucket_size": 7})
    assert found.engine.recompute_layers == 2
    assert plan(checkpoint_num_layers=2).engine.recompute_layers == 0


def test_all_that_ranks_and_vocabulary_break_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        plan(3, vocab_size=500, model_parallel_size=2, padded_vocab_size=400, train_batch_size=3)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("world_size", "keys", "stage"),
    [
        (1, {"zero_optimization": {"stage": 2}}, 0),
        (2, {"zero_optimization": {"stage": 2}}, 2),
        (2, {"zero_optimization": {"stage": 1}, "model_parallel_size": 2}, 0),
        (1, {"zero_optimization": {"stage": 3}}, 3),
        (1, {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, 1),
        (1, {"zero_optimization": {"stage": 0}, "precision": "fp16"}, 1),
    ],
)
def test_zero_stages_that_share_with_nobody_are_not_run(world_size, keys, stage):
    assert plan(world_size, **keys).engine.zero_stage == stage


@pytest.mark.parametrize(
    ("keys", "summed_in"),
    [
        ({"precision": "bfloat16", "gradient_accumulation_steps": 4}, "fp32"),
        ({"precision": "bfloat16", "gradient_accumulation_steps": 1}, None),
        ({"gradient_accumulation_steps": 4}, None),
        (
            {
                "precision": "bfloat16",
                "gradient_accumulation_steps": 4,
                "data_types": {"grad_accum_dtype": "bf16"},
            },
            "bf16",
        ),
    ],
)
def test_bf16_gradients_of_several_micro_batches_are_summed_in_fp32_unless_told_otherwise(keys, summed_in):
    assert plan(**keys).engine.gradient_accumulation_dtype == summed_in


BF16_SUMS = {"precision": "bfloat16", "gradient_accumulation_steps": 4, "zero_optimization": {"stage": 1}}
ONE = {"gradient_accumulation_steps": 1, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("keys", "in_fp32"),
    [
        (BF16_SUMS, True),
        (BF16_SUMS | {"fp32_allreduce": False}, False),
        (BF16_SUMS | {"gradient_accumulation_steps": 1}, False),
        (BF16_SUMS | {"gradient_accumulation_steps": 1, "fp32_allreduce": True}, True),
    ],
)
def test_replicas_average_gradients_in_the_type_of_their_sums_unless_told_otherwise(keys, in_fp32):
    found = plan(2, **keys)
    assert found.engine.fp32_allreduce is in_fp32
    assert deepspeed_settings(found)["communication_data_type"] == ("fp32" if in_fp32 else "bf16")


@pytest.mark.parametrize(
    ("keys", "stage"),
    [
        (BF16_SUMS, 1),
        (BF16_SUMS | ONE, 2),
        (BF16_SUMS | {"gradient_accumulation_steps": 1}, 1),
        (BF16_SUMS | ONE | {"pipe_parallel_size": 2}, 1),
        (BF16_SUMS | {"gpu_memory": 1}, 1),
        (BF16_SUMS | {"gpu_memory": 1e-4}, 2),
        (
            BF16_SUMS | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "gpu_memory": 1e-4},
            1,
        ),
    ],
)
def test_zero_1_runs_as_2_where_whole_sums_send_nothing_less_or_do_not_fit(keys, stage):
    found = plan(4, **keys)
    assert (found.engine.zero_stage, found.engine.asked_stage) == (stage, 1)
