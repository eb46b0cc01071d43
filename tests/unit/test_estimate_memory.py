"""The figures of --dry-run: who holds what, what it takes, and whether that is what really happens."""

import itertools
from pathlib import Path

import pytest

from bench.memory import (
    BEGIN,
    END,
    PAGE,
    SHAPES,
    SHAPES_BEGIN,
    SHAPES_END,
    at_rest,
    estimate,
    join_fake_group,
    measure,
    plan_of,
)
from megatron.config.load import config_from_flat
from megatron.config.pipeline_stages import layer_classes, stage_layers
from megatron.config.resolve import resolve
from megatron.estimate.describe import dry_run
from megatron.estimate.memory import fits, stage_memories

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8, "train_iters": 100}


def planned(world_size=1, vocab_size=1000, **keys):
    return resolve(config_from_flat(SHAPE | {"train_batch_size": 8} | keys), world_size, vocab_size)


@pytest.mark.parametrize(
    "method", ["type:transformer", "type:transformer|embedding", "type:.", "uniform", "parameters"]
)
@pytest.mark.parametrize(("layers", "stages"), [(2, 2), (4, 2), (5, 2), (6, 4), (7, 4), (9, 8), (12, 5), (8, 8)])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_are_dealt_as_deepspeed_deals_them(method, layers, stages, tied):
    import re

    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    from megatron.config.parameter_counts import layer_parameters

    plan = planned(
        stages,
        pipe_parallel_size=stages,
        num_layers=layers,
        pipe_partition_method=method,
        no_weight_tying=not tied,
        train_batch_size=8 * stages,
    )
    names = layer_classes(plan.model)
    if method == "uniform":
        bounds = partition_uniform(len(names), stages)
    elif method == "parameters":
        bounds = partition_balanced(layer_parameters(plan.model), stages)
    else:
        pattern = re.compile(method[5:], re.IGNORECASE)
        bounds = partition_balanced([int(bool(pattern.search(name))) for name in names], stages)
    assert [(layers.start, layers.stop) for layers in stage_layers(plan)] == list(itertools.pairwise(bounds))


def bytes_per_parameter(*world, **keys):
    stage = stage_memories(planned(*world, **keys))[0]
    return [round(size / stage.parameters, 3) for size in (stage.weights, stage.gradients, stage.optimizer)]


def test_states_are_sharded_stage_by_stage():
    assert bytes_per_parameter(4) == [4, 4, 8]
    assert bytes_per_parameter(4, zero_optimization={"stage": 1}) == [4, 4, 12 / 4]
    assert bytes_per_parameter(4, zero_optimization={"stage": 2}) == [4, 1, 12 / 4]
    assert bytes_per_parameter(4, zero_optimization={"stage": 3}) == [1, 1, 12 / 4]
    assert bytes_per_parameter(4, precision="bfloat16") == [2, 4, 12], (
        "whole fp32 masters, and sums of gradients in fp32"
    )
    assert bytes_per_parameter(4, precision="bfloat16", data_types={"grad_accum_dtype": "bf16"}) == [2, 2, 12]
    stage = {"precision": "bfloat16", "zero_optimization": {"stage": 1}}
    assert bytes_per_parameter(4, **stage) == [2, 2, 12 / 4]
    summed = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert bytes_per_parameter(4, **stage, **summed, train_micro_batch_size_per_gpu=1) == [2, 4, 12 / 4], "whole sums"
    assert bytes_per_parameter(4, **stage, **summed) == [2, 1, 12 / 4], "one micro-batch: stage 1 runs as stage 2"
    assert bytes_per_parameter(4, precision="fp16") == [2, 2, 12 / 4], "stage 0 runs as stage 1"
    assert bytes_per_parameter(1, optimizer={"type": "SGD"}) == [4, 4, 4]


def test_what_is_offloaded_is_the_hosts():
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    here = stage_memories(planned(4, zero_optimization={"stage": 3}))[0]
    away = stage_memories(planned(4, zero_optimization={"stage": 3} | offload))[0]
    assert (away.weights, away.optimizer, away.host) == (0, 0, here.weights + here.optimizer)
    assert here.host == 0
    assert here.peak - away.peak >= here.weights + here.optimizer


def test_a_stage_and_a_shard_hold_a_part():
    whole = stage_memories(planned(1))[0]
    split = stage_memories(planned(2, model_parallel_size=2))[0]
    stages = stage_memories(planned(2, pipe_parallel_size=2))
    assert whole.parameters / 2 < split.parameters < whole.parameters * 0.6
    embedding = 1024 * 48  # tied: both ends of the pipeline hold it, and the positions stay with the first
    assert sum(stage.parameters for stage in stages) == whole.parameters + embedding
    assert [stage.loss > 0 for stage in stages] == [False, True]


def test_an_earlier_stage_keeps_more_micro_batches():
    stages = stage_memories(planned(4, pipe_parallel_size=4, gradient_accumulation_steps=8))
    assert [round(stage.activations_kept / stages[2].activations_kept, 1) for stage in stages[:3]] == [2.0, 1.5, 1.0]


def test_recomputation_keeps_one_hidden_state_for_a_group_of_blocks():
    one = stage_memories(planned(checkpoint_activations=True))[0]
    two = stage_memories(planned(checkpoint_activations=True, checkpoint_num_layers=2))[0]
    assert one.activations == one.activations_recomputed < one.activations_kept
    hidden = 8 * 8 * 48 * 4
    assert one.activations - two.activations == 2 * hidden


def test_what_recomputation_keeps_is_cut_or_moved_to_the_host():
    def kept(ranks=2, **keys):
        plan = planned(ranks, checkpoint_activations=True, model_parallel_size=2, **keys)
        return stage_memories(plan)[0].activations

    hidden = 4 * 8 * 8 * 48 * 4  # one for each of four blocks
    assert kept() - kept(partition_activations=True) == hidden // 2
    assert kept() - kept(checkpoint_in_cpu=True) == hidden
    assert kept(partition_activations=True, sequence_parallel=True) == kept(sequence_parallel=True)
    assert (
        kept()
        < kept(recompute_granularity="selective")
        < stage_memories(planned(2, model_parallel_size=2))[0].activations
    )


def test_it_is_said_whether_the_run_fits():
    keys = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "seq_length": 2048}
    config = config_from_flat(SHAPE | keys | {"train_batch_size": 8, "precision": "bfloat16", "gpu_memory": 80})
    text = dry_run(config, resolve(config, 1, 50304), "train.py", [])
    assert "it does NOT fit into gpu_memory 80 GiB" in text
    assert "try checkpoint_activations: true" in text
    assert "it fits into gpu_memory 80 GiB" in dry_run(
        config_from_flat(SHAPE | {"gpu_memory": 80}), planned(), "train.py", []
    )
    assert fits(int(75.0 * 2**30), 80) is True
    assert fits(int(75.1 * 2**30), 80) is False


def test_generation_is_told_its_weights_and_the_room_for_texts():
    config = config_from_flat(SHAPE | {"gpu_memory": 1, "save": "x"})
    text = dry_run(config, resolve(config, 1, 1000, inference=True), "generate.py", [])
    assert "1,536 bytes of cache per token" in text
    assert "gpu_memory 1 GiB: it does not fit" in text, "CUDA takes that much"


def test_every_rank_that_shares_a_key_value_head_caches_it():
    config = config_from_flat(SHAPE | {"num_kv_heads": 1, "model_parallel_size": 2, "save": "x"})
    text = dry_run(config, resolve(config, 2, 1000, inference=True), "generate.py", [])
    one_head = 1536 // config.model.num_attention_heads
    assert f" {one_head} bytes of cache per token" in text


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(
            {"activation": "gelu_tanh", "checkpoint_activations": True, "zero_optimization": {"stage": 1}},
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"activation": "gelu_tanh", "checkpoint_activations": True, "recompute_granularity": "selective"},
            marks=pytest.mark.long,
        ),
        {
            "hidden_size": 96,
            "precision": "bfloat16",
            "norm": "rmsnorm",
            "pos_emb": "rotary",
            "activation": "swiglu",
            "ffn_hidden_size": 256,
            "num_kv_heads": 4,
            "gradient_accumulation_steps": 2,
        },
    ],
    ids=["GPT-2 in fp32, recomputed, ZeRO 1", "recomputed in part", "Llama's shape in bf16, accumulated"],
)
def test_a_real_step_allocates_what_was_estimated(keys):
    sizes = {"hidden_size": 192, "seq_length": 64}
    zero = {"zero_optimization": {"reduce_bucket_size": 300_000} | keys.get("zero_optimization", {})}
    plan = planned(**(sizes | keys | zero))
    real, stage = measure(plan), estimate(plan, 0)
    assert stage.least < real.peak
    assert at_rest(stage) == pytest.approx(real.rest, rel=0.01)
    assert stage.activations + stage.head_gradient == pytest.approx(real.saved, rel=0.01)
    assert stage.peak == pytest.approx(real.peak, rel=0.05)


# accumulated: gradients are summed, and sent, in fp32; the head's is larger than the bucket
@pytest.mark.parametrize(
    ("steps", "bucket"),
    [
        (2, 150_000),
        pytest.param(1, 150_000, marks=pytest.mark.long),
        pytest.param(2, 700_000, marks=pytest.mark.long),
    ],
)
def test_a_real_step_of_zero_3_allocates_what_was_estimated(steps, bucket):
    zero = {"stage": 3, "reduce_bucket_size": bucket, "stage3_param_persistence_threshold": 40_000}
    sizes = {"hidden_size": 192, "seq_length": 32, "gradient_accumulation_steps": steps}
    more = {"precision": "bfloat16", "checkpoint_activations": True, "train_batch_size": 4 * steps}
    plan = planned(2, **sizes, **more, zero_optimization=zero)
    join_fake_group(2)
    real, stage = measure(plan), estimate(plan, 0)
    assert at_rest(stage) == pytest.approx(real.rest, rel=0.01)
    assert stage.peak == pytest.approx(real.peak, rel=0.05)


@pytest.mark.long
def test_float8_casts_allocate_what_was_estimated():
    sizes = {"hidden_size": 192, "seq_length": 128, "num_attention_heads": 4, "precision": "bfloat16"}
    plan = planned(**sizes, precision_linear="float8", zero_optimization={"reduce_bucket_size": 300_000})
    real, stage = measure(plan), estimate(plan, 0)
    assert stage.peak == pytest.approx(real.peak, rel=0.05)
    compiled = planned(**sizes, precision_linear="float8", compile=True)
    assert stage_memories(compiled)[0].peak < stage.peak


def test_memory_that_gpus_share_is_counted():
    """Of async_tensor_parallel: two parts [8, 4, 48] of a product in bf16. Not measured: it needs several GPUs."""
    keys = {"model_parallel_size": 2, "sequence_parallel": True, "compile": True, "precision": "bfloat16"}
    alone, shared = (
        stage_memories(planned(2, **keys, async_tensor_parallel=shares))[0].permanent_buffers
        for shares in (False, True)
    )
    assert shared - alone == 2 * (8 * 4 * 48) * 2


@pytest.mark.long
def test_changed_scores_allocate_what_was_estimated():
    """At the peak some tensors of a block's scores are counted that another shape does not hold at once: 10%."""
    sizes = {"hidden_size": 192, "seq_length": 64, "activation": "gelu_tanh"}
    scores = {"pos_emb": "alibi", "attn_logit_softcapping": 5.0, "clip_qkv": 3.0}
    plan = planned(**sizes, **scores, zero_optimization={"reduce_bucket_size": 300_000})
    real, stage = measure(plan), estimate(plan, 0)
    assert stage.activations + stage.head_gradient == pytest.approx(real.saved, rel=0.01)
    assert stage.peak == pytest.approx(real.peak, rel=0.1)


@pytest.mark.long
def test_normalised_heads_save_what_was_estimated():
    shape = {
        "hidden_size": 96,
        "seq_length": 64,
        "num_layers": 2,
        "pos_emb": "rotary",
        "num_kv_heads": 4,
        "head_dim": 24,
    }

    def saved(**keys):
        plan = planned(**shape, norm="rmsnorm", zero_optimization={"reduce_bucket_size": 300_000}, **keys)
        return measure(plan).saved, estimate(plan, 0).activations

    plain, expected = saved()
    for kind in ("head", "full"):
        real, estimated = saved(qk_norm=kind)
        assert estimated - expected == pytest.approx(real - plain, rel=0.05), kind


def test_the_minimum_is_the_worst_of_three_moments():
    keys = {"precision": "bfloat16", "pos_emb": "rotary"}
    narrow = stage_memories(planned(**keys, train_batch_size=1))[0]  # few tokens beside the parameters
    assert narrow.least == narrow.weights + narrow.optimizer + narrow.gradients
    wide = {"seq_length": 512, "max_position_embeddings": 512, **keys}
    plain, whole = stage_memories(planned(**wide))[0], stage_memories(planned(**wide, checkpoint_activations=True))[0]
    states, head = plain.weights + plain.optimizer, 1024 * 48 * 4
    assert plain.least == states + plain.activations + head
    again = (plain.activations - whole.activations) // 4 + 8 * 512 * 48 * 2  # a block, of which the input is kept
    assert whole.least == states + whole.activations + again + head
    several = stage_memories(planned(**wide, train_batch_size=16, gradient_accumulation_steps=2))[0]
    assert several.least == plain.least - head + plain.gradients


@pytest.mark.parametrize("case", SHAPES)
def test_no_peak_is_below_its_minimum(case):
    for on_cpu in (False, True):
        (stage,) = stage_memories(plan_of(1, SHAPES[case]), on_cpu)
        assert stage.least <= stage.peak


def test_a_norm_that_is_composed_saves_two_tensors_in_fp32():
    def saved(on_cpu, **keys):
        return stage_memories(planned(norm="rmsnorm", **keys), on_cpu)[0].activations

    elements = 9 * 8 * 8 * 48  # nine norms of 8 x 8 tokens
    assert saved(True, precision="bfloat16") - saved(False, precision="bfloat16") == elements * (8 - 2)
    assert saved(True) - saved(False) == elements * 4, "the input is fp32 already"
    assert stage_memories(planned(), True) == stage_memories(planned(), False), "LayerNorm is a kernel everywhere"


@pytest.mark.parametrize(("begin", "end"), [(BEGIN, END), (SHAPES_BEGIN, SHAPES_END)])
def test_the_page_has_its_tables(begin, end):
    assert Path(PAGE).read_text().partition(begin)[2].partition(end)[0].count("\n| ") >= 15
