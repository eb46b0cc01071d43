"""What trains: the names of parameters, patterns, and what --dry-run says of them."""

from dataclasses import replace
from typing import cast

import pytest

from megatron.config.errors import ConfigError
from megatron.config.load import config_from_flat
from megatron.config.parameter_counts import checkpoint_bytes, held_parameters, trained_count
from megatron.config.parameter_shapes import layer_shapes, matches, trained_parameters
from megatron.config.resolve import resolve
from megatron.engine.modules import Sequential
from megatron.estimate.describe import dry_run, plan_lines
from megatron.estimate.memory import stage_memories
from megatron.model.gpt import gpt_layers
from megatron.parallel.parameter import PlacedParameter
from tests.models import VARIETY, small
from tests.ranks.run import one_rank

SHAPE = {"num_layers": 4, "hidden_size": 48, "num_attention_heads": 12, "seq_length": 8, "train_iters": 100}
MODELS = VARIETY | {
    "both norms": small(norm_placement="both", norm="rmsnorm_1p"),
    "norm of each head": small(qk_norm="each_head", num_kv_heads=2),
    "norm of all heads": small(qk_norm="full"),
}


def planned(world_size=1, **keys):
    config = config_from_flat(SHAPE | {"train_batch_size": 8, "precision": "bfloat16"} | keys)
    return config, resolve(config, world_size, 1000)


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_of_a_plan_are_those_of_the_model(name):
    with one_rank() as grid:
        module = Sequential(gpt_layers(MODELS[name], grid, None))
    built = {}
    for parameter in module.parameters():
        placed = cast(PlacedParameter, parameter)
        built[placed.global_name] = placed.shard_shape, placed.shard_dim
    shapes = {name: shape for layer in layer_shapes(MODELS[name]) for name, shape in layer.items()}
    assert {name: (shape.sizes, shape.shard_dim) for name, shape in shapes.items()} == built
    counted = trained_parameters(MODELS[name], (), 2, range(MODELS[name].num_layers + 3))
    assert counted == held_parameters(MODELS[name], 2, range(MODELS[name].num_layers + 3))


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        ("blocks.1", "blocks.1.mlp.up.weight", True),
        ("blocks.1", "blocks.10.mlp.up.weight", False),
        ("blocks.[0-3]", "blocks.3.mlp.up.weight", True),
        ("embedding", "embedding.positions.weight", True),
        ("norm", "blocks.0.input_norm.weight", False),
        (".*norm", "blocks.0.input_norm.weight", True),
        ("up|down", "blocks.0.mlp.down.bias", True),
        ("bias", "blocks.0.mlp.down.bias", True),
    ],
)
def test_a_pattern_is_whole_parts_of_a_name(pattern, name, wanted):
    assert matches(pattern, name) == wanted


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"freeze": ["embeding"]}, 'freeze: "embeding" matches no parameter of this model. Did you mean "embedding"?'),
        ({"freeze": ["blocks.4"]}, 'freeze: "blocks.4" matches no parameter of this model. Did you mean "blocks.0"?'),
        ({"freeze": ["zzz"]}, "such as: embedding, embedding.positions, blocks"),
        ({"freeze": [".*"]}, r"freeze (.*) leaves no parameter to train"),
        ({"freeze": ["blocks.(", "embedding"]}, '"blocks.(" is not a regular expression'),
        (
            {"freeze": ["embedding", "blocks.[01]"], "pipe_parallel_size": 2},
            "leaves no parameter of stage 0 of the pipeline to train; freeze less, or lower pipe_parallel_size (2)",
        ),
    ],
    ids=str,
)
def test_a_pattern_that_cannot_be_meant_is_refused(keys, message):
    with pytest.raises(ConfigError) as refused:
        planned(keys.get("pipe_parallel_size", 1), **keys)
    assert message in str(refused.value)


def test_only_what_trains_has_gradients_and_optimizer_states():
    config, plan = planned(freeze=["embedding", "blocks.[0-2]"])
    _, whole = planned()
    share = trained_count(plan) / trained_count(whole)
    assert 0.1 < share < 0.2
    found, everything = stage_memories(plan)[0], stage_memories(whole)[0]
    assert found.weights == everything.weights
    assert found.optimizer / everything.optimizer == pytest.approx(found.trained / found.parameters)
    assert found.gradients / everything.gradients == pytest.approx(found.trained / found.parameters)
    assert found.peak < everything.peak
    frozen = trained_count(whole) - trained_count(plan)
    assert checkpoint_bytes(plan) == 12 * trained_count(plan) + 2 * frozen
    line = f"trainable parameters: {trained_count(plan):,} of {trained_count(whole):,} ({share:.2%})"
    assert line in dry_run(config, plan, "train.py", [])
    assert any(line in each for each in plan_lines(plan))
    assert not any("trainable" in each for each in plan_lines(whole))


def test_a_frozen_head_computes_no_gradient_of_its_weight():
    _, plan = planned(freeze=["head"], no_weight_tying=True)
    _, whole = planned(no_weight_tying=True)
    assert stage_memories(plan)[0].loss < stage_memories(whole)[0].loss


def test_a_pipeline_balances_the_parameters_that_train():
    _, plan = planned(2, pipe_parallel_size=2, pipe_partition_method="parameters", freeze=["embedding", "blocks.0"])
    with_all = replace(plan, engine=replace(plan.engine, freeze=()))
    assert stage_memories(plan)[0].layers != stage_memories(with_all)[0].layers


LORA = {"rank": 4, "alpha": 8, "targets": ["query", "value", "blocks.0.mlp.up"]}


def test_the_plan_of_adapters_trains_them_alone():
    config, plan = planned(lora=LORA)
    _, whole = planned()
    # A and B of queries and values in 4 layers of width 48, and of one layer of 48 to 192
    wanted = 4 * (4 * 2 * (48 + 48) + (4 * (48 + 192)) // 4)
    assert trained_count(plan) == wanted
    found, everything = stage_memories(plan)[0], stage_memories(whole)[0]
    assert found.parameters == everything.parameters + wanted
    assert found.optimizer == wanted * 12
    assert checkpoint_bytes(plan) == 12 * wanted
    assert f"trainable parameters: {wanted:,} of" in dry_run(config, plan, "train.py", [])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": ["queri"]}, 'lora.targets: "queri" matches no parameter of this model. Did you mean "query"?'),
        ({"targets": ["blocks.1"], "pipe_parallel_size": 2}, "lora.targets (blocks.1) leaves no parameter of stage 1"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_are_refused(keys, message):
    flat = {key: value for key, value in keys.items() if key != "targets"}
    lora = LORA | {key: value for key, value in keys.items() if key == "targets"}
    with pytest.raises(ConfigError) as refused:
        planned(keys.get("pipe_parallel_size", 1), lora=lora, **flat)
    assert message in str(refused.value)
