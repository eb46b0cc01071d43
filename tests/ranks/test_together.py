"""Tests of several cases in one start of ranks: each tells of its own case."""

import pytest
import torch.distributed as dist

from tests.ranks.together import run_cases, run_together


def fails_on_the_last_rank(case: str) -> None:
    assert case != "bad" or dist.get_rank() == 0, "one rank fails, and the other goes on"


@pytest.mark.parametrize("case", ["one", "two"])
def test_cases_pass_that_pass_alone(request, case):
    run_together(request, fails_on_the_last_rank, lambda parameters: (parameters["case"],))


def test_a_case_that_fails_is_told_of_and_those_after_it_are_left_for_another_start():
    outcomes = run_cases(["one", "bad", "two"], 2, fails_on_the_last_rank, [("one",), ("bad",), ("two",)], timeout=60)
    assert outcomes.keys() == {"one", "bad"}
    assert outcomes["one"] is None
    assert "one rank fails, and the other goes on" in str(outcomes["bad"])
