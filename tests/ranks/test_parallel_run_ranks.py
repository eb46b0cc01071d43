"""The helper that runs ranks: what it reports when a rank fails, hangs or dies."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks.run import own_device, run_ranks


def everyone_adds_one() -> None:
    total = torch.ones((), device=own_device())
    dist.all_reduce(total)
    assert total == dist.get_world_size()


def rank_one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is not happy")
    time.sleep(30)


def rank_zero_hangs_in_its_sleep() -> None:
    if dist.get_rank() == 0:
        time.sleep(30)


def rank_one_is_killed() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGABRT)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_find_each_other(world):
    run_ranks(world, everyone_adds_one)


def test_a_failing_rank_is_reported_with_its_traceback_and_ends_the_others():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*rank one is not happy"):
        run_ranks(2, rank_one_fails)
    assert time.monotonic() - start < 25


def test_a_hanging_rank_is_reported_with_its_stack():
    with pytest.raises(AssertionError, match=r"rank 0 was still running:(.|\n)*rank_zero_hangs_in_its_sleep"):
        run_ranks(2, rank_zero_hangs_in_its_sleep, timeout=5)


def test_a_rank_that_a_signal_ends_is_reported():
    with pytest.raises(AssertionError, match="rank 1 ended with exit code -6"):
        run_ranks(2, rank_one_is_killed)
