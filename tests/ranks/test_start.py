"""How weights start: with the same bits in every layout, drawn only where none are loaded, never whole under ZeRO 3."""

import math
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter
from megatron.config.load import config_from_flat
from megatron.engine import training
from megatron.engine.inference import InferenceEngine
from megatron.engine.settings import DTYPES
from megatron.inference import find_trained_model, open_trained_model
from megatron.parallel import initial_values
from megatron.parallel.parameter import global_chunks
from megatron.training.identity import identity_of
from megatron.training.run import prepare, set_up
from tests.ranks.moves import ALL_OFFLOADED, OFFLOADED, TIED, engine_of
from tests.ranks.run import own_device, run_ranks

LAYOUTS: list[dict[str, Any]] = [
    {"pipe": 2, "tensor": 2, "zero": 1, "precision": "bf16"},
    {"data": 4, "zero": 3, "precision": "bf16"},
    {"tensor": 2, "data": 2, "zero": 3, "precision": "fp16"} | ALL_OFFLOADED,
]
MORE_LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 4},
    {"data": 4, "precision": "bf16"},
    {"data": 4, "zero": 2},
    {"pipe": 2, "data": 2, "zero": 1, "precision": "fp16"},
    {"data": 2, "context": 2, "zero": 3},
    {"data": 4, "zero": 2, "precision": "bf16"} | OFFLOADED,
    {"pipe": 4, "precision": "bf16"},
]


def draw_in_small_cells() -> None:
    """Each matrix of the small model in several cells, with borders that no layout has."""
    initial_values.CELL_ELEMENTS, initial_values.CELL_COLUMNS = 300, 20


def tensors_of_one_rank(file: str) -> None:
    draw_in_small_cells()
    engine, _ = engine_of({"model": TIED})
    torch.save({held.parameter.global_name: held.parameter.data for held in engine.state.fragments()}, file)


def equal_those_of_one_rank(file: str, layouts: list[dict[str, Any]]) -> None:
    draw_in_small_cells()
    whole: dict[str, Tensor] = torch.load(file, map_location=own_device())
    for layout in layouts:
        engine, plan = engine_of(layout | {"model": TIED})
        elements = 0
        for held in engine.state.fragments():
            name, shape = held.parameter.global_name, held.parameter.global_shape
            expected = whole[name][tuple(slice(size) for size in shape)]
            for offsets, chunk in global_chunks(held.parameter, held.start, held.tensors["fp32"]):
                part = tuple(slice(at, at + size) for at, size in zip(offsets, chunk.shape, strict=True))
                assert torch.equal(chunk, expected[part]), f"{layout}: master of {name}"
                elements += chunk.numel()
        assert elements, f"{layout}: this rank owns nothing"
        for parameter in engine._engine.module.parameters():
            if parameter.numel():  # ZeRO 3 holds partitions elsewhere
                rounded = whole[parameter.global_name].to(DTYPES[plan.engine.precision])
                (_, chunk), *_ = global_chunks(parameter, 0, parameter.detach().view(-1))
                dim, start = parameter.shard_dim, parameter.shard_start
                expected = rounded if dim is None else rounded.narrow(dim, start, chunk.shape[dim])
                assert torch.equal(chunk, expected[: chunk.shape[0]]), f"{layout}: {parameter.global_name}"


@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(MORE_LAYOUTS, marks=pytest.mark.long)], ids=["few", "more"])
def test_every_layout_starts_with_the_same_bits_in_masters_and_weights(tmp_path, layouts):
    file = str(tmp_path / "whole.pt")
    run_ranks(1, tensors_of_one_rank, file)
    run_ranks(4, equal_those_of_one_rank, file, layouts, timeout=120)


SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "tokenizer_type": "CharLevelTokenizer",
    "data_impl": "mock",
    "train_batch_size": 8,
    "train_iters": 20,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
}


def weights(engine: Any) -> dict[str, Tensor]:
    """The true rows of every weight: padding is not saved."""
    found = {held.parameter: held.tensors["fp32"].view(held.parameter.shape) for held in engine.state.fragments()}
    return {weight.global_name: values[: weight.global_shape[0]].clone() for weight, values in found.items()}


def starts_again_without_drawing(folder: str) -> None:
    config = config_from_flat(SMALL | {"save": folder, "load": folder})
    prepared = prepare(config, 1)
    run, _ = set_up(config, prepared)
    for held in run.engine.state.fragments():
        held.tensors["fp32"].add_(1.0)  # so that none is as it is drawn
    saved, identity = weights(run.engine), identity_of(prepared.tokenizer, config.data)
    CheckpointWriter(run.engine, Path(folder), config.to_flat(), identity=identity).save(TrainState(step=3))
    with patch.object(initial_values, "_draw_cell", side_effect=AssertionError("drawn")):
        with pytest.raises(AssertionError, match="drawn"):
            fresh = config_from_flat(SMALL)
            set_up(fresh, prepare(fresh, 1))
        resumed, state = set_up(config, prepare(config, 1))
        with patch.object(InferenceEngine, "pack_weights", return_value=[]):  # the state has no packed weights
            model = open_trained_model(find_trained_model(config), None)
    assert state.step == 3
    for engine in (resumed.engine, model.engine):
        found = weights(engine)
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_nothing_is_drawn_where_weights_are_loaded(tmp_path):
    run_ranks(1, starts_again_without_drawing, str(tmp_path / "run"))


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that were made in this mode and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.sizes.pop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return results


SIXTEEN_LAYERS = {"num_layers": 16, "attention_kinds": ("global",) * 16, "hidden_size": 128, "ffn_hidden_size": 512}


def holds_its_part_alone(settings: dict[str, Any]) -> None:
    built = []

    def note_and_make_masters(*arguments: Any) -> Any:
        built.append(live.peak)
        return make_masters(*arguments)

    buffers = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    make_masters = training._masters
    with LiveTensors() as live, patch.object(training, "_masters", note_and_make_masters):
        engine, plan = engine_of(settings | {"model": SIXTEEN_LAYERS, "zero_options": buffers})
    parameters = list(engine._engine.module.parameters())
    model, weight = engine.parameters_on_rank(), torch.finfo(DTYPES[plan.engine.precision]).bits // 8
    layer = sum(math.prod(p.shard_shape) for p in parameters if p.global_name.startswith("blocks.0."))
    part = model / settings["data"] if settings["zero"] == 3 else model
    small = 100_000  # partitions that do not divide, the rotary table, scalars
    # a layer is zeros in fp32, and then in the type of the weights
    assert built[0] < part * weight + layer * (4 + weight) + small
    assert live.peak < sum(live.sizes.values()) + small
    if settings["zero"] == 3:  # weights, masters, two moments, gradients
        assert live.peak < part * (weight + 4 + 8 + weight) + small


@pytest.mark.parametrize(
    "settings",
    [
        {"data": 1, "zero": 0, "precision": "bf16"},
        {"data": 4, "zero": 3, "precision": "bf16"},
        pytest.param({"data": 4, "zero": 3, "precision": "fp32"}, marks=pytest.mark.long),
        pytest.param({"data": 2, "zero": 1, "precision": "bf16"}, marks=pytest.mark.long),
        pytest.param({"data": 2, "zero": 2, "precision": "fp16"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_start_takes_no_more_memory_than_what_it_leaves_and_under_zero_3_no_rank_holds_the_model(settings):
    run_ranks(settings["data"], holds_its_part_alone, settings, timeout=120)
