"""A run that went back goes on like one that was resumed from the same checkpoint, in every kind of engine."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.checkpoint.folder import checkpoint_path, read_document
from megatron.checkpoint.state import TrainState
from megatron.checkpoint.store import CheckpointWriter, checkpoint_before, load_checkpoint
from tests.ranks.moves import TIED, different_tensors, engine_of, run_steps, same_progress
from tests.ranks.run import run_ranks

TWO_LAYERS = {"num_layers": 2, "attention_kinds": ("global",) * 2}
SKIP = {"optimizer": {"skip_update": 6.0, "skip_update_window": 8}}
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"data": 2, "precision": "bf16"} | SKIP,
    "zero3": {"data": 2, "zero": 3, "precision": "bf16"},
}
MORE_KINDS: dict[str, dict[str, Any]] = {
    "fp32 tensor": {"tensor": 2, "model": TIED} | SKIP,
    "zero2": {"data": 2, "zero": 2, "precision": "bf16", "accumulation": 2} | SKIP,
    "zero1": {"data": 2, "zero": 1, "precision": "bf16"},
    "zero1 summed": {"data": 2, "zero": 1, "precision": "bf16", "accumulation": 2},
    "fp16": {"data": 2, "precision": "fp16"},
    "pipeline": {"pipe": 2, "accumulation": 2, "model": TIED} | SKIP,
    "pipeline zero1": {"pipe": 2, "zero": 1, "precision": "bf16", "accumulation": 2, "model": TIED},
}


def goes_back(folder: str, kinds: dict[str, dict[str, Any]]) -> None:
    """Three steps and a checkpoint; two more and back; two more. And in a new engine: from the checkpoint two steps."""
    for name, settings in kinds.items():
        rewound, resumed = Path(folder, name, "rewound"), Path(folder, name, "resumed")
        settings = settings | {"model": TWO_LAYERS | settings.get("model", {})}
        engine, plan = engine_of(settings)
        state, _ = run_steps(engine, plan, TrainState(), 3)
        writer = CheckpointWriter(engine, rewound, {})
        writer.save(state, validation_loss=2.5)
        away, _ = run_steps(engine, plan, state, 2)
        assert checkpoint_before(rewound, range(3), away, 8) is None
        found = checkpoint_before(rewound, range(5), away, 8)
        assert found == checkpoint_path(rewound, 3)
        back = load_checkpoint(engine, found).leaving_out(40)
        writer.save_again(back)
        assert read_document(found / "progress.json")["validation_loss"] == 2.5, "as before"
        assert checkpoint_before(rewound, range(5), away, 8) is None, "it is on the way to the new state only"
        ended, _ = run_steps(engine, plan, back, 2)
        writer.save(ended, validation_loss=2.5)

        other, _ = engine_of(settings)
        again = load_checkpoint(other, checkpoint_path(rewound, 3))
        assert again == back == TrainState(3, 40, 384, ((24, 40),)), again
        CheckpointWriter(other, resumed, {}).save(run_steps(other, plan, again, 2)[0], validation_loss=2.5)
        if dist.get_rank() == 0:
            pair = checkpoint_path(rewound, 5), checkpoint_path(resumed, 5)
            assert different_tensors(*pair) == [], name
            assert same_progress(*pair), name


@pytest.mark.parametrize("kinds", [KINDS, pytest.param(MORE_KINDS, marks=pytest.mark.long)])
def test_after_going_back_everything_is_as_in_a_new_process(kinds, tmp_path):
    run_ranks(2, goes_back, str(tmp_path), kinds, timeout=200)


def passes_over_damage(folder: str) -> None:
    engine, plan = engine_of({})
    writer, state = CheckpointWriter(engine, Path(folder), {}), TrainState()
    for _ in range(2):
        state, _ = run_steps(engine, plan, state, 1)
        writer.save(state)
    first, second = (checkpoint_path(Path(folder), step) for step in (1, 2))
    assert checkpoint_before(Path(folder), range(10), state, 8) == second
    (written,) = (second / "state").glob("*.distcp")
    written.write_bytes(written.read_bytes()[:-1])
    assert checkpoint_before(Path(folder), range(10), state, 8) == first
    (written,) = (first / "state").glob("*.distcp")
    written.write_bytes(bytes(written.stat().st_size))
    assert checkpoint_before(Path(folder), range(10), state, 8) == first, "the size is as it was"
    assert checkpoint_before(Path(folder), range(10), state, 8, "full") is None


def passes_over_bad_weights(folder: str) -> None:
    """Two checkpoints, and three times back to the second one: the third time it is the first one."""
    engine, plan = engine_of({})
    save = Path(folder)
    writer, state = CheckpointWriter(engine, save, {}), TrainState()
    for _ in range(2):
        state, _ = run_steps(engine, plan, state, 1)
        writer.save(state)
    first, second = (checkpoint_path(save, step) for step in (1, 2))
    for skipped in (((16, 40),), ((16, 40), (40, 72))):
        assert checkpoint_before(save, range(3), state, 8) == second
        state = load_checkpoint(engine, second).leaving_out(skipped[-1][1], state.skipped_samples)
        assert (state.step, state.skipped_samples) == (2, skipped)
        writer.save_again(state)
        state = state.after_step(8, 64)
    assert checkpoint_before(save, range(11), state, 8) == second, "many good steps followed: its weights are good"
    assert checkpoint_before(save, range(10), state, 8) == first
    back = load_checkpoint(engine, first).leaving_out(104, state.skipped_samples)
    assert back == TrainState(1, 104, back.consumed_tokens, ((8, 16), (16, 40), (40, 104))), back
    assert back.trained_samples == 8
    writer.save_again(back)
    assert checkpoint_before(save, range(11), back, 8) == first


def test_a_checkpoint_after_which_every_way_spikes_is_passed_over(tmp_path):
    run_ranks(1, passes_over_bad_weights, str(tmp_path))


def test_damaged_checkpoints_are_passed_over(tmp_path):
    run_ranks(1, passes_over_damage, str(tmp_path))
