"""What a rank of the harness's test runs; apart from the test, so that no rank has to import the harness."""

from typing import Any

import pytest
import torch.distributed as dist

from megatron.harness import team as team_module
from megatron.harness.team import Team
from tests.harness_tasks import Weights
from tests.ranks.run import make_grid


def assert_answers(weights: Weights, tensor: int, work: list[tuple[Any, list[Any], list[Any]]]) -> None:
    """The first rank gets the answers it expects, with the model cut in `tensor`; the other ranks serve it.

    work: functions, batches, and the answers of one rank.
    """
    team_module.BATCHES_PER_ROUND = 2  # so that there are many rounds, and a last one that is not full
    team = Team(weights.on(make_grid(tensor=tensor)))
    if dist.get_rank() != 0:
        team.serve()
        return
    for compute, batches, expected in work:
        assert flat(team.ask(compute, batches, "test")) == pytest.approx(flat(expected), abs=1e-4)
    team.dismiss()


def flat(answers: Any) -> list[Any]:
    """The numbers and texts in lists of lists."""
    return [leaf for part in answers for leaf in flat(part)] if isinstance(answers, list | tuple) else [answers]
