"""Moves of a checkpoint from one layout to another: what the tests assert and `bench/checkpoint_moves.py` tabulates."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron import registry
from megatron.checkpoint.folder import find_checkpoint
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter, load_checkpoint
from megatron.engine.distributed import start_layout
from megatron.engine.training import TrainingEngine
from megatron.model.gpt import gpt_layers
from megatron.optimizers.schedules import learning_rate
from tests import tiny
from tests.ranks.run import deterministic_on_gpu, run_ranks

Settings = dict[str, Any]  # of tests.tiny.plan
STEPS = 4  # before the move, and again after it: an fp16 loss scale grows in the fourth

TIED = {"tied_embeddings": True}
GROUPED = {"num_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "bias_in_mlp": False}
SGD = {"kind": "sgd"}
OFFLOADED = {"zero_options": {"offload_optimizer": {"device": "cpu"}}}
SUMMED = {"accumulation": 2, "engine": {"gradient_accumulation_dtype": "fp32"}}  # of bf16 gradients
ALL_OFFLOADED = {"zero_options": OFFLOADED["zero_options"] | {"offload_param": {"device": "cpu"}}}


@dataclass(frozen=True)
class Move:
    """From one layout to another; `common` (model, optimizer, precision) is the same on both sides."""

    source: Settings
    target: Settings
    common: Settings = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{layout_name(self.source)} to {layout_name(self.target)}{describe(self.common)}"


def layout_name(settings: Settings) -> str:
    """Such as "pp2 tp2 zero1"."""
    short = {"pipe": "pp", "tensor": "tp", "context": "cp", "data": "dp", "zero": "zero"}
    named = " ".join(f"{short[key]}{settings[key]}" for key in short if key in settings)
    named += " sp" if settings.get("sequence_parallel") else ""
    named += f" {settings['accumulation']} micro-batches" if "accumulation" in settings else ""
    named += " offloaded" if "offload_optimizer" in settings.get("zero_options", {}) else ""
    return " ".join(part for part in (named or "one rank", settings.get("precision", "")) if part)


def describe(common: Settings) -> str:
    """What is special about the model, for a name."""
    model, words = common.get("model", {}), [common.get("precision", "")]
    words += ["tied"] * model.get("tied_embeddings", False) + ["GQA"] * ("num_kv_heads" in model)
    words += [common["optimizer"]["kind"]] if "optimizer" in common else []
    words = [word for word in words if word]
    return f" ({', '.join(words)})" if words else ""


# ZeRO 0-3, offloaded too; pipeline, tensor and context sizes 1, 2, 4; sequences cut over tensor-parallel ranks; tied
# and untied, grouped queries, two optimizers, three precisions; of bf16 every way in which masters are kept
MOVES = [
    Move({"pipe": 2, "tensor": 2, "zero": 1}, {"data": 4, "zero": 3}, {"model": TIED | GROUPED}),
    Move({"data": 2, "zero": 3}, {"tensor": 2}),
    Move({"tensor": 4}, {"pipe": 4}),
    Move({"pipe": 2, "data": 2}, {"zero": 2}, {"model": TIED}),
    Move({}, {"pipe": 2, "tensor": 2, "zero": 1}, {"model": GROUPED}),
    Move({"pipe": 4}, {"tensor": 4, "zero": 1}, {"model": TIED}),
    Move({"pipe": 2, "tensor": 2, "zero": 1}, {"data": 4, "zero": 3}, {"precision": "bf16", "model": TIED}),
    Move({"data": 2, "zero": 3}, {"pipe": 2, "zero": 1}, {"precision": "bf16"}),
    Move({"tensor": 4}, {"pipe": 4}, {"precision": "bf16"}),
    Move({"data": 4, "zero": 2}, {}, {"precision": "bf16", "model": GROUPED}),
    Move({"data": 2, "zero": 1}, {"tensor": 2}, {"precision": "fp16"}),
    Move({"pipe": 2}, {"data": 2, "zero": 3}, {"precision": "fp16", "model": TIED}),
    Move({"data": 2, "zero": 1}, {"tensor": 2}, {"optimizer": SGD}),
    Move({"pipe": 2, "tensor": 2}, {"data": 2, "zero": 2}, {"optimizer": SGD, "model": TIED}),
    Move({"tensor": 2, "data": 2, "zero": 3}, {"pipe": 2, "zero": 1}, {"precision": "bf16", "optimizer": SGD}),
    Move({"data": 2, "zero": 1, "precision": "bf16"}, {"zero": 0, "precision": "fp32"}),
    Move({"tensor": 2, "context": 2, "sequence_parallel": True}, {"context": 2, "zero": 3}, {"model": TIED}),
    Move({"context": 2, "data": 2, "zero": 1}, {"tensor": 2, "sequence_parallel": True}, {"precision": "bf16"}),
    Move({"data": 2, "zero": 1} | OFFLOADED, {"data": 2, "zero": 3} | ALL_OFFLOADED, {"precision": "fp16"}),
    Move({"data": 2, "zero": 3} | ALL_OFFLOADED, {"pipe": 2}, {"precision": "bf16"}),
    Move({"pipe": 2, "data": 2, "zero": 1} | SUMMED, {"data": 2}, {"precision": "bf16", "model": TIED}),
    Move({"tensor": 2}, {"data": 2, "zero": 1} | SUMMED, {"precision": "bf16"}),
    Move({"tensor": 2}, {}, {"model": {"num_kv_heads": 1}}),
    Move({}, {"tensor": 2, "zero": 1}, {"model": {"num_kv_heads": 1}}),
]


@dataclass(frozen=True)
class Outcome:
    """What a move did."""

    same_bits: bool  # saved again under the target layout, every tensor and the progress equal the source's
    next_gap: float  # next loss: moved, and never disturbed under the source layout
    gap: float  # the largest over all steps after the move
    noise: float  # the same steps of two undisturbed runs, one in each layout


def carry_out(move: Move, folder: Path, with_noise: bool = True, steps: int = STEPS) -> Outcome:
    """Train, save, load under the target layout, save again, train on; and train the undisturbed runs.

    steps: before the move, and again after it.
    """
    source, target = move.common | move.source, move.common | move.target
    (saved, _), (_, undisturbed) = train_all(
        source, [Segment(folder / "source", None, steps), Segment(folder / "undisturbed", None, 2 * steps)]
    )
    after = [Segment(folder / "again", saved, 0), Segment(folder / "moved", saved, steps)]
    after += [Segment(folder / "other", None, 2 * steps)] * with_noise
    (again, _), (_, moved), *others = train_all(target, after)
    gaps = [abs(a - b) for a, b in zip(moved, undisturbed[steps:], strict=True)]
    noise = float("nan")
    for _, other in others:
        noise = max(abs(a - b) for a, b in zip(other[steps:], undisturbed[steps:], strict=True))
    return Outcome(not different_tensors(saved, again) and same_progress(saved, again), gaps[0], max(gaps), noise)


def engine_of(settings: Settings) -> tuple[TrainingEngine, Any]:
    """An engine on this rank, and its plan."""
    registry.load_plugins(["tests.own_optimizers"])
    plan = tiny.plan(**settings)
    if plan.engine.precision == "fp16":
        allow_fp16_on_cpu()
    grid = start_layout(plan.layout)
    layers = gpt_layers(plan.model, grid, plan.engine.seed)
    return TrainingEngine(layers, grid, plan), plan


def allow_fp16_on_cpu() -> None:
    """This CPU may have no fp16 arithmetic: torch then computes it slowly, which is good enough for a test."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def run_steps(engine: TrainingEngine, plan: Any, state: TrainState, steps: int) -> tuple[TrainState, list[float]]:
    """Train `steps` steps; returns the state after them and their losses."""
    losses = []
    for _ in range(steps):
        batch = tiny.micro_batches(state.step, plan, engine.grid.rank("data"))
        rate = learning_rate(plan.schedule, state.step)
        losses.append(float(engine.train_batch(batch, step=state.step, learning_rate=rate).loss))
        state = state.after_step(plan.batch.global_size, plan.batch.tokens_per_step)
    return state, losses


def segment(folder: str, settings: Settings, load: str | None, steps: int) -> None:
    """On a rank: train `steps` more steps from `load` (or from scratch) and save into `folder`."""
    deterministic_on_gpu()  # a run that was resumed is compared bit by bit
    engine, plan = engine_of(settings)
    state = load_checkpoint(engine, Path(load)) if load else TrainState()
    state, losses = run_steps(engine, plan, state, steps)
    CheckpointWriter(engine, Path(folder), {"seq_length": tiny.SEQUENCE}).save(state)
    if torch.distributed.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))


@dataclass(frozen=True)
class Segment:
    """So many steps from `load` (None: from scratch), whose checkpoint and losses go into `folder`."""

    folder: Path
    load: Path | None
    steps: int


def segments(settings: Settings, wanted: list[Segment]) -> None:
    """On a rank: one after the other, each in an engine of its own."""
    for part in wanted:
        segment(str(part.folder), settings, part.load and str(part.load), part.steps)


def train_all(settings: Settings, wanted: list[Segment]) -> list[tuple[Path, list[float]]]:
    """Run segments in one start of the ranks of a layout; of each its checkpoint and its losses."""
    run_ranks(tiny.ranks_of(settings), segments, settings, wanted, timeout=180)
    return [(_checkpoint(part.folder), json.loads((part.folder / "losses.json").read_text())) for part in wanted]


def train(folder: Path, settings: Settings, load: Path | None, steps: int) -> tuple[Path, list[float]]:
    """Run one segment; its checkpoint and its losses."""
    return train_all(settings, [Segment(folder, load, steps)])[0]


def _checkpoint(folder: Path) -> Path:
    found = find_checkpoint(folder)
    assert found is not None
    return found


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: read by torch alone, without our code."""
    reader = dcp.FileSystemReader(checkpoint / "state")
    metadata = reader.read_metadata().state_dict_metadata
    state = {n: torch.full(m.size, torch.nan) for n, m in metadata.items() if isinstance(m, TensorStorageMetadata)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def same_progress(one: Path, other: Path) -> bool:
    """Whether step, samples, tokens, updates and loss scale are the same; the scale where both have one."""
    first, second = (json.loads((path / "progress.json").read_text()) for path in (one, other))
    scales = [progress.pop("loss_scale") for progress in (first, second)]
    return first == second and (scales[0] == scales[1] or not all(scales))


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that differ in any bit, or are in one checkpoint only, or were not written completely."""
    first, second = tensors(one), tensors(other)
    common = first.keys() & second.keys()
    different = [name for name in common if not torch.equal(first[name], second[name])]
    holes = [name for name, value in first.items() if value.isnan().any()]
    return sorted([*different, *(first.keys() ^ second.keys()), *holes])
