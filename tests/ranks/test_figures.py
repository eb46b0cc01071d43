"""Norms, statistics and the noise scale are those of the whole model: every layout against one rank, in fp32.

They differ by the order of additions only, as losses do (test_layouts.py). Norms of 16-bit runs are compared loosely.
"""

import json
import math
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.config.schema.run_keys import LoggingKeys
from megatron.engine.distributed import start_layout
from megatron.engine.figures import ParameterFigures
from megatron.engine.training import TrainingEngine
from megatron.metrics.writers import MetricWriters
from megatron.model.gpt import gpt_layers
from megatron.training.hooks.base import Hook
from megatron.training.hooks.gradient_noise import GradientNoise
from megatron.training.hooks.norms import Norms
from megatron.training.loop import train_steps
from tests import tiny
from tests.ranks.run import run_ranks

STEPS = 4
KEYS = LoggingKeys(
    log_interval=2, log_param_norm=True, log_grad_norm=True, log_optimizer_states=True, log_activations=True
)
TIED = {"model": {"tied_embeddings": True}}
BF16 = {"precision": "bf16", "accumulation": 2}
ONE_RANK = {"plain": {}, "tied": TIED, "bf16": BF16}
# name -> layout, and the run of one rank that it is compared with
TWO_RANKS: dict[str, tuple[dict, str]] = {
    "data": ({"data": 2}, "plain"),
    "zero1": ({"data": 2, "zero": 1}, "plain"),
    "zero2 x2": ({"data": 2, "zero": 2, "accumulation": 2}, "plain"),
    "zero3": ({"data": 2, "zero": 3}, "plain"),
    "context": ({"context": 2}, "plain"),
    "tensor": ({"tensor": 2, "sequence_parallel": True}, "plain"),
    "tensor, recomputed": ({"tensor": 2, "recompute": 2}, "plain"),
    "pipe": ({"pipe": 2, "accumulation": 2}, "plain"),
    "pipe, tied": ({"pipe": 2} | TIED, "tied"),
    "bf16 zero1 x2": ({"data": 2, "zero": 1} | BF16, "bf16"),
}
FOUR_RANKS: dict[str, tuple[dict, str]] = {
    "pipe data zero1": ({"pipe": 2, "data": 2, "zero": 1, "accumulation": 2}, "plain"),
    "tensor zero3": ({"tensor": 2, "data": 2, "zero": 3}, "plain"),
    "pipe tensor, tied": ({"pipe": 2, "tensor": 2} | TIED, "tied"),
}


class Record(Hook):
    """What the other hooks told, and the norm of all gradients."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def after_step(self, step):
        if step.metrics:
            self.rows.append(dict(step.metrics) | {"norm": float(step.output.norm)})
        return {}


def train(folder: str, runs: dict[str, dict]) -> None:
    for name, settings in runs.items():
        plan = tiny.plan(**settings)
        grid = start_layout(plan.layout)
        engine = TrainingEngine(gpt_layers(plan.model, grid, plan.engine.seed), grid, plan)
        record = Record()
        noise = GradientNoise(engine.gradient_sum(engine.parameter_figures()), 2, tiny.GLOBAL_BATCH, 2)
        hooks = [Norms(engine, KEYS, 0, STEPS), noise, record]
        batches = (tiny.micro_batches(step, plan, grid.rank("data")) for step in range(STEPS))
        train_steps(tiny.run(engine, plan, 0, STEPS), TrainState(), batches, hooks, MetricWriters())
        if dist.get_rank() == 0:
            Path(folder, f"{name}.json").write_text(json.dumps(record.rows))


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """By run, of each logged step. One start of ranks for all runs of a size."""
    folder = tmp_path_factory.mktemp("figures")

    def get(name: str) -> list[dict[str, float]]:
        if not (folder / f"{name}.json").exists():
            settings = ONE_RANK.get(name) or (TWO_RANKS | FOUR_RANKS).get(name, ({},))[0]
            world = tiny.ranks_of(settings)
            runs = {1: ONE_RANK, 2: dict_of(TWO_RANKS), 4: dict_of(FOUR_RANKS)}[world]
            run_ranks(world, train, str(folder), runs, timeout=200)
        return json.loads((folder / f"{name}.json").read_text())

    return get


def dict_of(runs: dict[str, tuple[dict, str]]) -> dict[str, dict]:
    return {name: settings for name, (settings, _) in runs.items()}


@pytest.mark.parametrize("name", [*TWO_RANKS, *(pytest.param(name, marks=pytest.mark.long) for name in FOUR_RANKS)])
def test_figures_of_a_layout_are_those_of_one_rank(figures, name):
    reference = (TWO_RANKS | FOUR_RANKS)[name][1]
    found, wanted = figures(name), figures(reference)
    assert len(found) == len(wanted) == STEPS // 2
    for row, expected in zip(found, wanted, strict=True):
        assert list(row) == list(expected), "the same names in the same order"
        bound = 0.1 if reference == "bf16" else 1e-4
        wrong = {key: (row[key], expected[key]) for key in row if not close(key, row[key], expected[key], bound)}
        assert not wrong


def close(key: str, found: float, wanted: float, bound: float) -> bool:
    if key == "train/noise_scale":  # a quotient of differences
        return bound > 1e-4 or math.isclose(found, wanted, rel_tol=1e-2)
    return math.isclose(found, wanted, rel_tol=bound, abs_tol=bound / 10)


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_the_norms_of_the_parameters_make_up_the_norms_of_the_model(figures, name):
    for row in figures(name):
        for prefix, total in (("gradient_norms/", row["norm"]), ("parameter_norms/", row["train/param_norm"])):
            parts = [value for key, value in row.items() if key.startswith(prefix)]
            assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(total, rel=1e-5)


def compare_with_plain_torch() -> None:
    plan = tiny.plan()
    grid = start_layout(plan.layout)
    engine = TrainingEngine(gpt_layers(plan.model, grid, plan.engine.seed), grid, plan)
    hook = Norms(engine, LoggingKeys(**dict(KEYS) | {"log_interval": 1}), 0, 1)
    module = engine._engine.module
    outputs = []
    for block in module.layers[1:5]:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach()))
    gradients = {}
    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda seen: gradients.__setitem__(seen.global_name, float(seen.grad.norm()))
        )
    record = Record()
    train_steps(
        tiny.run(engine, plan, 0, 1),
        TrainState(),
        iter([tiny.micro_batches(0, plan, 0)]),
        [hook, record],
        MetricWriters(),
    )
    [row] = record.rows
    assert {key.removeprefix("gradient_norms/") for key in row if key.startswith("gradient_norms/")} == set(gradients)
    for parameter in module.parameters():
        name = parameter.global_name
        assert row[f"parameter_norms/{name}"] == pytest.approx(float(parameter.norm()), rel=1e-6)
        assert row[f"gradient_norms/{name}"] == pytest.approx(gradients[name], rel=1e-5, abs=1e-9)
        moment = engine.state._inner.state[parameter]["exp_avg"]
        assert row[f"optimizer_state_norms/{name}_exp_avg"] == pytest.approx(float(moment.norm()), rel=1e-5)
    for index, hidden in enumerate(outputs):
        assert row[f"activations_rms/blocks.{index}"] == pytest.approx(float(hidden.square().mean().sqrt()), rel=1e-5)
        assert row[f"activations_max/blocks.{index}"] == pytest.approx(float(hidden.abs().max()), rel=1e-6)


def test_on_one_rank_they_are_what_torch_computes():
    run_ranks(1, compare_with_plain_torch)


class Counter(Hook):
    """How often squares have been computed, after each step."""

    def __init__(self, figures: ParameterFigures) -> None:
        self.calls, self.after, self.squares = 0, list[int](), figures.squares
        figures.squares = self.count

    def count(self, views):
        self.calls += 1
        return self.squares(views)

    def after_step(self, step):
        self.after.append(self.calls)
        return {}


def count_by_step() -> None:
    plan = tiny.plan()
    grid = start_layout(plan.layout)
    engine = TrainingEngine(gpt_layers(plan.model, grid, plan.engine.seed), grid, plan)
    hook = Norms(engine, KEYS, 0, STEPS)
    counter = Counter(hook._figures)
    batches = (tiny.micro_batches(step, plan, 0) for step in range(STEPS))
    train_steps(tiny.run(engine, plan, 0, STEPS), TrainState(), batches, [hook, counter], MetricWriters())
    logged = counter.after[1]
    assert logged > 0
    assert counter.after == [0, logged, logged, 2 * logged]


def test_nothing_is_computed_in_steps_that_are_not_logged():
    run_ranks(1, count_by_step)
