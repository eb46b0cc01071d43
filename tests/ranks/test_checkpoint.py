"""Checkpoints: the same layout goes on bit for bit, another layout holds the same state bit for bit."""

import contextlib
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import folder as folders
from megatron.checkpoint.chunks import local_chunks
from megatron.checkpoint.folder import Retention, find_checkpoint, prune, publish
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter, checkpoint_config, load_checkpoint, load_weights
from megatron.config.parameter_counts import parameter_count
from megatron.engine.distributed import start
from megatron.engine.inference import InferenceEngine
from megatron.engine.training import TrainingEngine
from megatron.errors import RunError, UserError
from megatron.model.gpt import gpt_layers
from tests import tiny
from tests.operations import Operations
from tests.ranks.moves import (
    MOVES,
    STEPS,
    TIED,
    Move,
    Segment,
    carry_out,
    different_tensors,
    engine_of,
    run_steps,
    tensors,
    train,
    train_all,
)
from tests.ranks.run import own_device, run_ranks

MODEL = {"tied_embeddings": True, "hidden_dropout": 0.1, "neftune_noise_alpha": 5.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32"},
        pytest.param({"precision": "fp32", "data": 2, "zero": 2, "accumulation": 2}, marks=pytest.mark.long),
        {"precision": "bf16", "pipe": 2, "zero": 1},
        {"precision": "fp16", "data": 2, "zero": 3},
    ],
    ids=str,
)
def test_six_steps_at_once_equal_three_and_three_after_a_restart(tmp_path, settings):
    settings = settings | {"model": MODEL}
    (whole, losses), (half, first) = train_all(
        settings, [Segment(tmp_path / "whole", None, 6), Segment(tmp_path / "half", None, 3)]
    )
    resumed, second = train(tmp_path / "resumed", settings, half, 3)
    assert first + second == losses
    assert different_tensors(whole, resumed) == []


QUICK = (0, 3, 10)  # the others are long


@pytest.mark.parametrize(
    "move", [m if i in QUICK else pytest.param(m, marks=pytest.mark.long) for i, m in enumerate(MOVES)], ids=str
)
def test_another_layout_takes_over_every_bit_and_trains_on_the_same(tmp_path, move):
    """fp32: as argued in test_layouts.py. 16 bit: layouts round differently, as two undisturbed runs show as well.

    Their gap is one draw of many; where it happens to be small, one rounding of a bf16 logit near 1 (2 ** -9) stands.
    """
    in_16_bit = "precision" in {**move.common, **move.source}
    outcome = carry_out(move, tmp_path, with_noise=in_16_bit, steps=STEPS if in_16_bit else 2)
    assert outcome.same_bits
    assert outcome.gap < (max(4 * outcome.noise, 2**-9) if in_16_bit else 1e-5)


OWN = [
    Move({"data": 2, "zero": 1}, {"tensor": 2}, {"optimizer": {"kind": "signs"}}),
    Move({"data": 2, "zero": 3}, {"pipe": 2}, {"optimizer": {"kind": "adagrad"}}),
    Move({"pipe": 2}, {"data": 2, "zero": 1}, {"optimizer": {"kind": "adagrad"}}),
]


@pytest.mark.parametrize("move", [OWN[0], *(pytest.param(move, marks=pytest.mark.long) for move in OWN[1:])], ids=str)
def test_the_state_of_an_optimizer_that_a_plugin_brings_moves_as_well(tmp_path, move):
    """The plugin is `tests/own_optimizers.py`. fp32, and bound as the other moves are, but for what signs do:

    a sign turns where rounding moves a gradient through zero, and takes the weight two learning rates away.
    """
    outcome = carry_out(move, tmp_path, with_noise=True, steps=2)
    assert outcome.same_bits
    assert outcome.gap < max(1e-5, 4 * outcome.noise)


def every_element_has_one_owner(settings: dict) -> None:
    engine, plan = engine_of(settings)
    replicated = engine.state.replicated_over_data
    owned = local_chunks(engine.state.fragments(), engine.grid, owned_only=True, replicated_over_data=replicated)
    elements = sum(chunk.numel() for local in owned.values() for chunk in local.chunks.values())
    count = torch.tensor(elements, device=own_device())
    torch.distributed.all_reduce(count)
    assert int(count) == 3 * parameter_count(plan.model)  # the master and two moments


@pytest.mark.parametrize(
    "settings",
    [{"tensor": 2, "context": 2}, {"data": 2, "context": 2, "zero": 1}, {"pipe": 2, "tensor": 2, "model": TIED}],
    ids=str,
)
def test_every_element_is_written_by_one_rank(settings):
    run_ranks(4, every_element_has_one_owner, settings)


def inference_logits(checkpoint: str, out: str, settings: dict) -> None:
    plan = tiny.plan(**settings)
    grid = start(tensor=plan.layout.tensor)
    engine = InferenceEngine(gpt_layers(plan.model, grid, seed=99), grid)
    load_weights(engine, Path(checkpoint))
    whole = {r.parameter.global_name: r.parameter for r in engine.state.fragments() if r.parameter.shard_dim is None}
    if torch.distributed.get_rank() == 0:
        torch.save(whole, out)


def test_inference_takes_the_weights_of_any_training_layout(tmp_path):
    saved, _ = train(tmp_path / "source", {"pipe": 2, "data": 2, "zero": 1}, None, 2)
    run_ranks(2, inference_logits, str(saved), str(tmp_path / "whole.pt"), {"tensor": 2})
    stored = tensors(saved)
    taken = torch.load(tmp_path / "whole.pt", map_location="cpu", weights_only=False)
    assert taken and all(torch.equal(value, stored[f"{name}/fp32"]) for name, value in taken.items())


def loading_another_model(checkpoint: str) -> None:
    engine, _ = engine_of({"model": {"ffn_hidden_size": 64}})
    with pytest.raises(UserError, match=r"holds another model.*\n.*blocks\.0\.mlp.*makes it .*64.*checkpoint has .*96"):
        load_checkpoint(engine, Path(checkpoint))


def loading_a_smaller_model(checkpoint: str) -> None:
    engine, _ = engine_of({"pipe": 2, "model": {"num_layers": 2, "attention_kinds": ("global",) * 2}})
    with pytest.raises(UserError, match=r"blocks\.2\..*the checkpoint has it, the configured model does not"):
        load_checkpoint(engine, Path(checkpoint))


def test_a_checkpoint_of_a_larger_model_is_refused_on_every_stage(tmp_path):
    saved, _ = train(tmp_path / "source", {}, None, 1)
    run_ranks(2, loading_a_smaller_model, str(saved))


def test_another_model_is_refused_with_both_shapes(tmp_path):
    saved, _ = train(tmp_path / "source", {}, None, 1)
    run_ranks(1, loading_another_model, str(saved))


def saving_without_space(folder: str, asynchronous: bool) -> None:
    """Save a good checkpoint, then one for which the last rank may write no more than 4 KiB a file."""
    engine, plan = engine_of({"data": 2, "zero": 1})
    state, _ = run_steps(engine, plan, TrainState(), 1)
    writer = CheckpointWriter(engine, Path(folder), {}, asynchronous=asynchronous)
    writer.save(state)
    writer.finish()
    state, _ = run_steps(engine, plan, state, 1)
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    with pytest.raises(RunError, match=r"cannot save .*global_step2.*bytes are free there"):
        writer.save(state)
        writer.finish()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_a_rank_that_cannot_write_fails_all_ranks_and_the_last_good_checkpoint_stays(tmp_path, asynchronous):
    run_ranks(2, saving_without_space, str(tmp_path), asynchronous)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step1", "latest"]
    found = find_checkpoint(tmp_path)
    assert found == tmp_path / "global_step1"
    assert len(tensors(found)) > 30


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Writing a checkpoint takes a while, in which no other may be written."""
    plain, going_on = folders.publish, []

    def slow(*arguments: Any) -> None:
        assert not going_on
        going_on.append(True)
        time.sleep(0.2)
        plain(*arguments)
        going_on.clear()

    folders.publish = slow
    yield
    folders.publish = plain


@one_at_a_time()
def saving_six(folder: str) -> None:
    engine, plan = engine_of({})
    state = TrainState()
    retention = Retention(last=2, milestones=frozenset({1}), best=True)
    writer = CheckpointWriter(engine, Path(folder), {"seq_length": tiny.SEQUENCE}, retention, asynchronous=True)
    for _ in range(6):
        state, _ = run_steps(engine, plan, state, 1)
        writer.save(state, is_best=state.step == 3)
    writer.finish()


def test_pruning_leaves_the_last_two_the_milestone_and_the_best(tmp_path):
    run_ranks(1, saving_six, str(tmp_path))
    kept = ["best", "global_step1", "global_step3", "global_step5", "global_step6", "latest"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert (tmp_path / "best").read_text() == "global_step3"
    assert (tmp_path / "latest").read_text() == "global_step6"
    assert checkpoint_config(tmp_path / "global_step6") == {"seq_length": tiny.SEQUENCE}
    assert find_checkpoint(tmp_path) == tmp_path / "global_step6"
    assert find_checkpoint(tmp_path, 3, "full") == tmp_path / "global_step3"
    with pytest.raises(UserError, match=r"iteration 2: .*there are: 1, 3, 5, 6"):
        find_checkpoint(tmp_path, 2)


def test_a_run_that_went_back_prunes_what_it_left_behind_and_not_what_it_writes(tmp_path):
    for step in (10, 20, 12):
        (tmp_path / "unfinished").mkdir()
        publish(tmp_path / "unfinished", tmp_path / f"global_step{step}", {"progress.json": {}}, {})
    prune(tmp_path, Retention(last=2))
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == ["global_step10", "global_step12"]
    (tmp_path / "global_step12" / "progress.json").unlink()
    assert find_checkpoint(tmp_path) == tmp_path / "global_step10"


def asynchronous_save_while_training(folder: str) -> None:
    """The copy is of the step it was asked for, whatever training does meanwhile; a second save reuses its memory."""
    engine, plan = engine_of({"data": 2, "zero": 1})
    writer = CheckpointWriter(engine, Path(folder, "behind"), {}, asynchronous=True)
    state = TrainState()
    for _ in range(2):
        state, _ = run_steps(engine, plan, state, 2)
        CheckpointWriter(engine, Path(folder, "plain"), {}).save(state)
        writer.finish()
        with Operations() as operations:
            writer.save(state)
        assert operations.count["aten::_local_scalar_dense"] <= 1, "the count of updates, and nothing else, is read"
        made = [name for name in operations.count if re.search("empty|clone|_to_copy|contiguous", name)]
        assert made == [] and operations.count["aten::copy_"] == number_of_chunks(engine)
        run_steps(engine, plan, state, 3)
    writer.finish()


def number_of_chunks(engine: TrainingEngine) -> int:
    owned = local_chunks(engine.state.fragments(), engine.grid, owned_only=True, replicated_over_data=False)
    return sum(len(local.chunks) for local in owned.values())


def test_an_asynchronous_checkpoint_equals_a_synchronous_one(tmp_path):
    run_ranks(2, asynchronous_save_while_training, str(tmp_path))
    for name in ("global_step2", "global_step4"):
        assert different_tensors(tmp_path / "plain" / name, tmp_path / "behind" / name) == []
