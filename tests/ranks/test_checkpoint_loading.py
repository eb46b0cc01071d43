"""What is taken from a checkpoint and what is not, that all ranks take the same one, and what taking it costs."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.checkpoint_load import HIDDEN, SOURCE, TARGETS, measure
from megatron.checkpoint import folder as folders
from megatron.checkpoint.converted import StoredWeight, write_converted
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter, agree_on_checkpoint
from megatron.config.schema.run_keys import CheckpointKeys
from megatron.errors import RunError, UserError
from megatron.training.start import agreed, begin
from tests.ranks.moves import engine_of, layout_name, run_steps, tensors, train
from tests.ranks.run import BACKEND, own_device, run_ranks
from tests.ranks.test_checkpoint_damage import flip_a_byte

STEPS = 6
SETTINGS = {"data": 2, "zero": 1, "model": {"hidden_dropout": 0.1}}
FRESH_SCALE = 256.0


def begin_with(checkpoint: str, precision: str, **keys: bool):
    """A fresh engine, brought to where a run with these keys begins."""
    engine, plan = engine_of(SETTINGS | {"precision": precision})
    state, _ = begin(engine, Path(checkpoint), CheckpointKeys(**keys))
    return engine, plan, state


def taken_from(engine, kind: str, stored: dict[str, torch.Tensor]) -> bool:
    """Whether this rank's state of a kind is that of the checkpoint; its pieces are compared by their sums."""
    mine: dict[str, float] = {}
    for fragment in engine.state.fragments():
        name = f"{fragment.parameter.global_name}/{kind}"
        mine[name] = mine.get(name, 0.0) + float(fragment.tensors[kind].double().sum())
    names = sorted(stored)
    sums = torch.tensor([mine.get(name, 0.0) for name in names], dtype=torch.float64, device=own_device())
    torch.distributed.all_reduce(sums)
    wanted = torch.stack([stored[name].double().sum() for name in names])
    return bool(torch.allclose(sums.cpu(), wanted, rtol=1e-9, atol=1e-9))


def choices(checkpoint: str, precision: str) -> None:
    of_kind = {
        kind: {name: value for name, value in tensors(Path(checkpoint)).items() if name.endswith(f"/{kind}")}
        for kind in ("fp32", "exp_avg", "exp_avg_sq")
    }
    losses = {}
    for keys in ({}, {"no_load_rng": True}, {"no_load_optim": True}, {"finetune": True}):
        engine, plan, state = begin_with(checkpoint, precision, **keys)
        goes_on = not keys or "no_load_rng" in keys
        assert state.step == (0 if "finetune" in keys else STEPS), keys
        assert (state == TrainState()) == ("finetune" in keys), keys
        assert taken_from(engine, "fp32", of_kind["fp32"]), keys
        for moment in ("exp_avg", "exp_avg_sq"):
            assert taken_from(engine, moment, of_kind[moment]) == goes_on, (keys, moment)
            zero = all(not fragment.tensors[moment].any() for fragment in engine.state.fragments())
            assert zero != goes_on, (keys, moment)
        assert engine.state.updates == (STEPS if goes_on else 0), keys
        if precision == "fp16":
            assert (engine.state.loss_scale["cur_scale"] > FRESH_SCALE) == goes_on, keys
        if goes_on:
            losses[len(keys)] = run_steps(engine, plan, state, 3)[1]
    assert losses[0] == losses[1], "dropout is no state, so there is nothing that no_load_rng could leave out"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.long)])
def test_finetune_takes_weights_no_load_optim_keeps_the_step_and_no_load_rng_changes_nothing(tmp_path, precision):
    saved, _ = train(tmp_path / "source", SETTINGS | {"precision": precision}, None, STEPS)
    run_ranks(2, choices, str(saved), precision, timeout=120)


def finding(folder: str) -> None:
    agree_on_checkpoint(None)
    agree_on_checkpoint(Path(folder, "global_step5"))
    rank = torch.distributed.get_rank()
    for found in (Path(folder, f"global_step{rank}"), None if rank else Path(folder, "global_step0")):
        with pytest.raises(
            RunError, match=r"ranks found different checkpoints \(rank 0: .*step0; rank 1: .*(step1|none)"
        ):
            agree_on_checkpoint(found)


def test_ranks_that_find_different_checkpoints_all_end_with_a_list_of_what_they_found(tmp_path):
    run_ranks(2, finding, str(tmp_path))


def hashing_together(folder: str) -> None:
    """Two checkpoints of two files each; then a byte of the newer one flips, in the file of one of the ranks."""
    rank, save = torch.distributed.get_rank(), Path(folder)
    engine, _ = engine_of(SETTINGS)
    writer = CheckpointWriter(engine, save, {})
    for step in (1, 2):
        writer.save(TrainState(step))
    newest, keys = save / "global_step2", CheckpointKeys(verify="full")
    hashed: list[str] = []
    plain = folders.file_hash
    folders.file_hash = lambda path: hashed.append(path.name) or plain(path)
    assert agreed(newest, keys, lambda _: pytest.fail("it is the one that was held to everything")) == newest
    everyones: list = [None, None]
    torch.distributed.all_gather_object(everyones, hashed)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert sorted([*everyones[0], *everyones[1]]) == sorted(Path(name).name for name in files) and all(everyones)
    if rank == 0:
        flip_a_byte(newest)
    torch.distributed.barrier()
    checked: list[Path] = []
    assert agreed(newest, CheckpointKeys(), checked.append) == newest and checked == []  # sizes are as they were
    assert agreed(newest, keys, checked.append) == save / "global_step1"
    assert checked == [save / "global_step1"]
    with pytest.raises(UserError, match=r"global_step2 is damaged:\n.*has other content than was written"):
        agreed(newest, CheckpointKeys(verify="full", iteration=2), checked.append)


def test_ranks_share_out_the_files_to_hash_and_all_take_the_one_before_a_damaged_one(tmp_path):
    run_ranks(2, hashing_together, str(tmp_path))


@pytest.mark.long
@pytest.mark.skipif(BACKEND == "nccl", reason="it measures the memory of the host, where ranks on a GPU hold no state")
@pytest.mark.parametrize("target", TARGETS, ids=layout_name)
def test_loading_needs_little_besides_the_share_of_a_rank(target):
    """At most twice the largest piece that was stored: its bytes, and the tensor they become.

    The pieces are halves of the largest tensor here (two tensor-parallel ranks wrote them). Half a tensor more is
    allowed for what the allocator keeps, and a fixed amount for code and buffers.
    """
    for vocabulary in (16384, 65536):
        (excess,) = measure(vocabulary, SOURCE, [target])
        assert excess < 1.5 * 4 * vocabulary * HIDDEN + (24 << 20)


def starts_from_weights_alone(checkpoint: str) -> None:
    with pytest.raises(UserError, match="finetune: true starts a run with them"):
        begin_with(checkpoint, "fp32")
    engine, _, state = begin_with(checkpoint, "fp32", finetune=True)
    assert state == TrainState()
    assert taken_from(engine, "fp32", tensors(Path(checkpoint)))


def test_weights_without_an_optimizers_state_start_a_run_but_resume_none(tmp_path):
    saved, _ = train(tmp_path / "run", SETTINGS | {"precision": "fp32"}, None, 1)
    state = tensors(saved)
    weights = {
        name.removesuffix("/fp32"): StoredWeight(value.shape, partial(state.__getitem__, name))
        for name, value in state.items()
        if name.endswith("/fp32")
    }
    path = write_converted(tmp_path / "converted", weights, {})
    run_ranks(2, starts_from_weights_alone, str(path))
