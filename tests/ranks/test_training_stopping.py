"""All ranks end after the same step, whichever of them gets the signal."""

import os
import signal
import time

import pytest
import torch
from torch import distributed as dist

from megatron.checkpoint.state import TrainState
from megatron.engine.training import StepOutput
from megatron.metrics.writers import MetricWriters
from megatron.training.hooks.base import NOTHING, Hook
from megatron.training.loop import train_steps
from megatron.training.stopping import Spike, StopRequest, StopVote
from tests import tiny
from tests.ranks.run import make_grid, run_ranks


def vote_ten_times(asked: dict[int, int]) -> list[int]:
    """The step that each rank ends with, when ranks get SIGUSR1 during steps; 0: none. asked: rank -> step."""
    rank = torch.distributed.get_rank()
    request = StopRequest(None)
    ended = 0
    with request.listening():
        vote = StopVote(request, make_grid().host_group)
        for step in range(1, 11):
            vote.begin()
            time.sleep(0.02 * rank)  # ranks are not in step with each other
            if asked.get(rank) == step:
                os.kill(os.getpid(), signal.SIGUSR1)
            if vote.ends_run():
                ended = step
                break
    all_ended = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_ended, ended)
    assert (vote.reason is None) == (ended == 0)
    assert vote.reason in (None, "SIGUSR1")
    return all_ended


def ends_together(asked: dict[int, int], expected: int) -> None:
    assert vote_ten_times(asked) == [expected] * torch.distributed.get_world_size()


@pytest.mark.parametrize(("asked", "expected"), [({}, 0), ({1: 3}, 4), ({0: 5, 2: 4}, 5), ({0: 10}, 0)])
def test_all_ranks_end_with_the_step_after_the_first_request(asked, expected):
    run_ranks(3, ends_together, asked, expected)


def reaches_its_limit() -> None:
    request = StopRequest(0.001 if torch.distributed.get_rank() == 1 else None)
    time.sleep(0.1)
    vote = StopVote(request, make_grid().host_group)
    vote.begin()
    assert vote.ends_run()
    assert vote.reason == "time_limit_minutes"


def test_the_time_limit_of_one_rank_ends_all():
    run_ranks(2, reaches_its_limit)


def goes_back_together() -> None:
    vote = StopVote(StopRequest(None), make_grid().host_group)
    seen = []
    for asked in (None, Spike(4, 6), None):
        vote.begin(asked if dist.get_rank() == 1 else None)
        assert not vote.ends_run()
        seen.append(vote.spike)
    assert seen == [None, Spike(4, 6), None]


def test_all_ranks_go_back_when_one_asks_to():
    run_ranks(2, goes_back_together)


class Engine:
    """An engine whose steps take longer on rank 1."""

    def train_batch(self, batch, *, step, learning_rate):
        time.sleep(0.05 * dist.get_rank())
        return StepOutput(torch.tensor(float(step)), torch.tensor(1.0))


class LooksAtTheVote(Hook):
    """Notes whether the vote was over when the hook was called."""

    def __init__(self, vote: StopVote) -> None:
        self.vote = vote
        self.was_over: list[bool] = []

    def after_step(self, step):
        self.was_over.append(self.vote._pending.is_completed())
        return NOTHING


def hooks_act_between_votes() -> None:
    vote = StopVote(StopRequest(None), make_grid().host_group)
    hook = LooksAtTheVote(vote)
    train_steps(tiny.run(Engine(), tiny.plan(), 0, 5), TrainState(), iter(range(5)), [hook], MetricWriters(), vote)
    assert hook.was_over == [True] * 5


def test_no_vote_is_in_flight_while_hooks_act():
    """A collective that is recorded while a hook stops torch's profiler makes it read freed memory: ranks crash."""
    run_ranks(2, hooks_act_between_votes)
