"""Frozen parameters: under every engine they keep their bits, have no optimizer state, and everything else trains.

fp32, and the bound of test_layouts.py for the same reasons.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.reading import SafeReader, read_tensors, tensor_shapes
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter, load_checkpoint
from megatron.config.parameter_shapes import layer_shapes, trained_parameters, trains
from megatron.parallel.initial_values import draw
from tests import tiny
from tests.ranks.moves import engine_of, run_steps
from tests.ranks.run import run_ranks
from tests.ranks.together import run_together

FREEZE = ("embedding", r"blocks\.0", ".*norm", "mlp.up")
TIED = {"tied_embeddings": True}
STEPS = 3


def segment(folder: str, settings: dict, load: str | None, first: bool) -> None:
    """On a rank: train some steps from scratch or from `load`, and save; save at step 0 too if `first`."""
    engine, plan = engine_of(settings)
    writer = CheckpointWriter(engine, Path(folder), {})
    state = load_checkpoint(engine, Path(load)) if load else TrainState()
    if first:
        writer.save(state)
    state, losses = run_steps(engine, plan, state, STEPS)
    writer.save(state)
    steps = {name for f in engine.state.fragments() if len(f.tensors) > 1 for name in [f.parameter.global_name]}
    assert all(trains(name, FREEZE) for name in steps)
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


def train(folder: Path, settings: dict, load: Path | None = None, first: bool = False) -> tuple[Path, list[float]]:
    settings = settings | {"engine": {"freeze": FREEZE} | settings.get("engine", {})}
    run_ranks(tiny.ranks_of(settings), segment, str(folder), settings, load and str(load), first, timeout=180)
    return find_checkpoint(folder), json.loads((folder / "losses.json").read_text())


LAYOUTS = [
    {"tensor": 2, "sequence_parallel": True},
    {"pipe": 2, "model": TIED},
    {"data": 2, "zero": 1},
    {"data": 2, "zero": 2, "model": TIED},
    {"data": 2, "zero": 3},
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    known = {}

    def get(**settings):
        key = json.dumps(settings)
        if key not in known:
            known[key] = train(tmp_path_factory.mktemp("one"), settings)[1]
        return known[key]

    return get


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_trains_what_is_not_frozen_as_one_rank_does(request, reference, layout):
    def arguments(case):
        layout = case["layout"]
        return reference(**{key: layout[key] for key in ("model",) if key in layout}), layout

    run_together(request, trains_like, arguments)


def trains_like(wanted: list[float], settings: dict) -> None:
    """On a rank: from scratch; on the first one, losses are to be those of one rank."""
    engine, plan = engine_of(settings | {"engine": {"freeze": FREEZE}})
    _, losses = run_steps(engine, plan, TrainState(), STEPS)
    if dist.get_rank() == 0:
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 1e-5
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16", "model": TIED},
        {"precision": "fp16", "data": 2, "zero": 2},
        {"precision": "bf16", "data": 2, "zero": 3},
        {"pipe": 2, "zero": 1, "data": 2, "precision": "bf16", "accumulation": 2},
    ],
    ids=str,
)
def test_frozen_weights_keep_their_bits_and_a_resumed_run_too(tmp_path, settings):
    whole, _ = train(tmp_path / "whole", settings, first=True)
    start = read_tensors(tmp_path / "whole" / "global_step0")
    end = read_tensors(whole)
    for name in start:
        parameter, _, kind = name.rpartition("/")
        frozen = not trains(parameter, FREEZE)
        assert torch.equal(start[name], end[name]) == frozen, name
        assert not frozen or kind == "fp32", name
    again, _ = train(tmp_path / "again", settings, load=tmp_path / "whole" / "global_step0")
    other = read_tensors(again)
    assert all(torch.equal(other[name], end[name]) for name in end)


def moments(folder: str, settings: dict) -> None:
    engine, _ = engine_of(settings)
    draw((f.parameter, f.start, f.tensors["fp32"]) for f in engine.state.fragments())
    CheckpointWriter(engine, Path(folder), {}).save(TrainState())


def test_the_plan_knows_what_trains(tmp_path):
    settings = {"engine": {"freeze": FREEZE}}
    run_ranks(1, moments, str(tmp_path), settings)
    stored = tensor_shapes(SafeReader(tmp_path / "global_step0" / "state"))
    plan = tiny.plan(model={"padded_vocab_size": tiny.MODEL.vocab_size}, **settings)
    counted = trained_parameters(plan.model, FREEZE, 1, range(len(layer_shapes(plan.model))))
    assert counted == sum(shape.numel() for name, shape in stored.items() if name.endswith("exp_avg"))
