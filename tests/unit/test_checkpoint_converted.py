"""Weights from elsewhere become a checkpoint, one tensor at a time, or nothing."""

import gc
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.converted import StoredWeight, write_converted
from megatron.checkpoint.folder import damage, find_checkpoint
from megatron.checkpoint.reading import read_tensors
from megatron.errors import RunError, UserError

SHAPE = (7, 13)


def weight(value: float) -> StoredWeight:
    return StoredWeight(SHAPE, lambda: torch.full(SHAPE, value, dtype=torch.bfloat16))


def in_memory() -> int:
    """Bytes of all tensors of SHAPE."""
    found = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == SHAPE and each.is_cpu]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}.values())


def test_a_checkpoint_is_written_one_tensor_at_a_time_and_found_whole(tmp_path):
    held = []

    def read() -> torch.Tensor:
        held.append(in_memory())
        return torch.ones(SHAPE)

    weights = {f"blocks.{index}.weight": StoredWeight(SHAPE, read) for index in range(9)}
    path = write_converted(tmp_path, weights, {"hidden_size": 13})
    one = 4 * 7 * 13
    assert max(held) <= one  # the one that has just been written, at most
    assert find_checkpoint(tmp_path) == path
    assert damage(path, "full") == []
    assert set(read_tensors(path)) == {f"{name}/fp32" for name in weights}


def test_weights_of_16_bits_are_stored_in_32(tmp_path):
    path = write_converted(tmp_path, {"a": weight(1.5), "b": weight(-2)}, {})
    stored = read_tensors(path)
    assert torch.equal(stored["a/fp32"], torch.full(SHAPE, 1.5))
    assert torch.equal(stored["b/fp32"], torch.full(SHAPE, -2.0))


def test_a_weight_that_cannot_be_read_leaves_nothing_behind(tmp_path):
    def fails() -> torch.Tensor:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot save .*No space left on device"):
        write_converted(tmp_path, {"a": weight(1), "b": StoredWeight(SHAPE, fails)}, {})
    assert [path.name for path in tmp_path.iterdir() if path.name != ".save.lock"] == []


def test_a_weight_of_another_shape_than_announced_is_a_failure(tmp_path):
    with pytest.raises(RunError, match=r"a was read as \[3\] instead of \[7, 13\]"):
        write_converted(tmp_path, {"a": StoredWeight(SHAPE, lambda: torch.ones(3))}, {})


def test_a_folder_with_a_checkpoint_is_refused(tmp_path: Path):
    write_converted(tmp_path, {"a": weight(1)}, {})
    with pytest.raises(UserError, match="already holds global_step0"):
        write_converted(tmp_path, {"a": weight(2)}, {})
