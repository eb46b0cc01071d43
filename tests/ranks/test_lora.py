"""LoRA: every layout trains the same adapters, and checkpoints hold nothing else.

fp32, and the bound of test_layouts.py for the same reasons.
"""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.converted import checkpoint_weights, write_converted
from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.merge import merged_weights
from megatron.checkpoint.reading import SafeReader, read_tensors, tensor_shapes
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter, load_checkpoint, load_weights
from megatron.config.parameter_shapes import ALL_BUT_ADAPTERS, is_adapter
from megatron.config.plan import LoraPlan
from megatron.engine.distributed import start_layout
from megatron.engine.inference import InferenceEngine
from megatron.engine.training import TrainingEngine
from megatron.errors import UserError
from megatron.model.gpt import gpt_layers
from tests import tiny
from tests.models import random_tokens
from tests.ranks.moves import allow_fp16_on_cpu, run_steps
from tests.ranks.run import one_rank, run_ranks
from tests.ranks.together import run_together

WHOLE = LoraPlan(4, 8.0, 0.0, ("query_key_value", "dense", "mlp"))
PARTS = LoraPlan(3, 8.0, 0.0, ("query", "value", r"blocks\.[0-2]\.mlp\.gate", "down"))
GROUPED = {"num_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm"}
MODELS = {
    "whole": {"lora": WHOLE, "parallel_residual": True},
    "parts": {"lora": PARTS, "tied_embeddings": True} | GROUPED,
    "whole, shared heads": {"lora": WHOLE, "num_attention_heads": 6, "num_kv_heads": 3},
    "parts, shared head": {"lora": PARTS, "num_kv_heads": 1, "activation": "swiglu"},
}
STEPS = 3


def plan_of(kind: str, dropout: float = 0.0, **settings):
    model = MODELS[kind] | {"lora": replace(MODELS[kind]["lora"], dropout=dropout)}
    return tiny.plan(model=model, engine={"freeze": (ALL_BUT_ADAPTERS,)}, **settings)


def engine_of(plan, base: bool = False) -> TrainingEngine:
    if plan.engine.precision == "fp16":
        allow_fp16_on_cpu()
    grid = start_layout(plan.layout)
    return TrainingEngine(gpt_layers(plan.model, grid, None if base else 1234, 1234), grid, plan)


def train(folder: str, kind: str, settings: dict, save: bool, load: str | None, steps: int) -> None:
    """On a rank; rank 0 writes the losses."""
    losses = trained(folder, kind, settings, save, load, steps)
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


def trains_like(wanted: list[float], kind: str, settings: dict) -> None:
    """On a rank; on the first one, losses are to be those of one rank."""
    losses = trained("", kind, settings, save=False, load=None, steps=STEPS)
    if dist.get_rank() == 0:
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-5


def trained(folder: str, kind: str, settings: dict, save: bool, load: str | None, steps: int) -> list[float]:
    """On a rank: losses from the seed on, from the base in `load`, or from adapters in `load`."""
    plan = plan_of(kind, **settings)
    engine, state = engine_of(plan, base=load is not None), TrainState()
    if load is not None and Path(load).parent.name == "adapters":
        state = load_checkpoint(engine, Path(load))
    elif load is not None:
        load_weights(engine, Path(load))
    state, losses = run_steps(engine, plan, state, steps)
    if save:
        CheckpointWriter(engine, Path(folder), {}).save(state)
    return losses


def losses_of(
    folder: Path, kind: str, settings: dict, save: bool = False, load: Path | None = None, steps: int = STEPS
) -> list[float]:
    folder.mkdir(exist_ok=True)
    world = tiny.ranks_of(settings)
    run_ranks(world, train, str(folder), kind, settings, save, load and str(load), steps, timeout=400)
    return json.loads((folder / "losses.json").read_text())


LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True},
    {"pipe": 2},
    {"data": 2, "zero": 1},
    {"data": 2, "zero": 2},
    {"data": 2, "zero": 3},
    {"context": 2},
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return cache(lambda kind: losses_of(tmp_path_factory.mktemp("one"), kind, {}))


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(layout, ("whole", "parts")[i % 2], marks=[pytest.mark.long] if "context" in layout else [])
        for i, layout in enumerate(LAYOUTS)
    ]
    + [
        ({"tensor": 2, "sequence_parallel": True}, "whole, shared heads"),
        ({"tensor": 2, "data": 2, "zero": 3}, "parts, shared head"),
    ],
    ids=str,
)
def test_a_layout_trains_the_adapters_of_one_rank(request, reference, layout, kind):
    run_together(
        request,
        trains_like,
        lambda case: (reference(case["kind"]), case["kind"], case["layout"]),
        lambda case: tiny.ranks_of(case["layout"]),
    )


def learn(file: str, kind: str) -> None:
    """On a rank: the same batch again and again."""
    plan = plan_of(kind)
    engine = engine_of(plan)
    batch = tiny.micro_batches(0, plan, 0)
    losses = [float(engine.train_batch(batch, step=0, learning_rate=1e-2).loss) for _ in range(20)]
    Path(file).write_text(json.dumps(losses))


def test_adapters_learn(tmp_path):
    """Of 4.1, the logarithm of 61 tokens, weights that are frozen as they were drawn leave adapters some to learn."""
    run_ranks(1, learn, str(tmp_path / "losses"), "whole")
    losses = json.loads((tmp_path / "losses").read_text())
    assert losses[-1] < losses[0] - 0.3


def save_base(folder: str, kind: str) -> None:
    plan = tiny.plan(model=MODELS[kind] | {"lora": None})
    grid = start_layout(plan.layout)
    engine = TrainingEngine(gpt_layers(plan.model, grid, 99), grid, plan)
    CheckpointWriter(engine, Path(folder), {}).save(TrainState())


def base_of(folder: Path, kind: str) -> Path:
    run_ranks(1, save_base, str(folder), kind)
    found = find_checkpoint(folder)
    assert found is not None
    return found


def logits(path: Path, model, base: str | None = None) -> torch.Tensor:
    with one_rank() as grid:
        engine = InferenceEngine(gpt_layers(model, grid, None), grid)
        load_weights(engine, path, base)
        return engine.logits(engine.hidden(random_tokens(model, 2, 12)))[..., : model.vocab_size].clone()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("whole", {"precision": "bf16", "tensor": 2, "dropout": 0.2}, marks=pytest.mark.long),
        ("parts", {"data": 2, "zero": 3}),
        pytest.param("whole", {"pipe": 2, "zero": 1, "dropout": 0.2}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_checkpoint_holds_adapters_only_and_a_resumed_run_is_the_uninterrupted_one(tmp_path, kind, settings):
    base = base_of(tmp_path / "base", kind)
    losses_of(tmp_path / "adapters", kind, settings, save=True, load=base)
    first = find_checkpoint(tmp_path / "adapters")
    assert first is not None
    names = tensor_shapes(SafeReader(first / "state"))
    assert all(map(is_adapter, names))
    assert {name.rpartition("/")[2] for name in names} == {"fp32", "exp_avg", "exp_avg_sq"}
    resumed = losses_of(tmp_path / "resumed", kind, settings, save=True, load=first)
    whole = losses_of(tmp_path / "whole", kind, settings, save=True, load=base, steps=2 * STEPS)
    assert resumed == whole[STEPS:]
    ends = [read_tensors(tmp_path / name / f"global_step{2 * STEPS}") for name in ("resumed", "whole")]
    assert set(ends[0]) == set(ends[1]) == set(names)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in names)


def test_merged_weights_compute_the_same_and_the_base_is_found_or_refused(tmp_path):
    kind = "parts"
    model = replace(tiny.MODEL, **MODELS[kind])
    base = base_of(tmp_path / "base", kind)
    losses_of(tmp_path / "adapters", kind, {}, save=True, load=base)
    first = find_checkpoint(tmp_path / "adapters")
    assert first is not None
    adapted, alone = logits(first, model), logits(base, replace(model, lora=None))
    assert (adapted - alone).abs().max() > 0.01
    weights = merged_weights(checkpoint_weights(base), checkpoint_weights(first), model)
    merged = write_converted(tmp_path / "merged", weights, {"seq_length": 16})
    # one product of W + BA instead of two: fp32's rounding of logits of order one
    assert (logits(merged, replace(model, lora=None)) - adapted).abs().max() < 1e-5
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "base", moved)
    with pytest.raises(UserError, match=r"which is missing; lora\.base names the folder"):
        logits(first, model)
    assert torch.equal(logits(first, model, str(moved)), adapted)
    manifest = moved / base.name / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(UserError, match="is another one"):
        logits(first, model, str(moved))
    with pytest.raises(UserError, match="holds adapters only"):
        logits(first, replace(model, lora=None))
