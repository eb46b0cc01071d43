"""Which ranks count as slow, in which phase, and when they no longer do."""

import time
from itertools import count

import pytest
import torch

from megatron.training.clock import ReadingTime
from megatron.training.hooks.stragglers import Spans, StepTimes
from megatron.training.straggler_rule import INTERVALS, Slow, StragglerRule, Times

USUAL = Times(data=0.001, forward=0.1, update=0.01, step=0.4)


def slow(phase: str, seconds: float) -> Times:
    return Times(**{**vars(USUAL), phase: seconds})


def told(rule: StragglerRule, intervals: list[list[Times]]) -> list[tuple[int, int, str]]:
    """(interval, rank, phase) of each report."""
    return [(at, each.rank, each.phase) for at, times in enumerate(intervals) for each in rule.judge(times)]


@pytest.mark.parametrize(("phase", "seconds"), [("data", 0.05), ("forward", 0.2), ("update", 0.02)])
def test_a_rank_that_is_slow_for_three_intervals_is_told_once(phase, seconds):
    times = [USUAL, slow(phase, seconds), USUAL]
    rule = StragglerRule([0, 0, 0])
    assert rule.judge(times) == rule.judge(times) == []
    assert rule.judge(times) == [Slow(1, phase, seconds, getattr(USUAL, phase))]
    assert told(rule, [times] * 9) == []


@pytest.mark.parametrize(("phase", "seconds"), [("data", 0.02), ("forward", 0.125), ("update", 0.0125)])
def test_what_hardly_costs_a_step_anything_is_not_told(phase, seconds):
    assert told(StragglerRule([0, 0]), [[USUAL, slow(phase, seconds)]] * 9) == []


def test_a_rank_that_wavers_is_not_told_again_until_it_was_fine_for_three_intervals():
    bad, good = [USUAL, slow("forward", 0.3)], [USUAL, USUAL]
    rule = StragglerRule([0, 0])
    assert told(rule, [bad, bad, good] * 5) == [], "never three in a row"
    assert told(rule, [bad] * 3) == [(2, 1, "forward")]
    assert told(rule, [good, good, bad, bad, bad, good, good, bad, bad, bad]) == []
    assert told(rule, [good] * INTERVALS + [bad] * INTERVALS) == [(2 * INTERVALS - 1, 1, "forward")]


def test_ranks_are_compared_with_those_of_the_same_stage():
    """The stages of a pipeline do different work; and a rank that has no equal is compared with none."""
    twice = slow("forward", 0.2)
    assert told(StragglerRule(["first", "first", "last", "last"]), [[USUAL, USUAL, twice, twice]] * 5) == []
    assert told(StragglerRule(["first", "last"]), [[USUAL, twice]] * 5) == []
    found = told(StragglerRule(["first", "first", "last", "last"]), [[USUAL, twice, twice, twice]] * 5)
    assert found == [(2, 1, "forward")]


def test_only_what_happens_within_a_step_is_timed(monkeypatch):
    clock = count()  # one second later each time
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    reading = ReadingTime()
    times = StepTimes(torch.device("cpu"), reading)
    batches = reading.watched(count())
    forward = times.forward.timed("forward", lambda: None)
    assert times.forward.timed("backward", forward) is forward, "nothing else is wrapped"
    for _ in range(3):
        times.begin_step()
        next(batches)
        forward()
        forward()
        times.update.begin()
        times.update.end()
        times.end_step()
        forward()  # a validation
    times.begin_step()
    # from the beginning of a step to the next one the clock is read 9 times
    assert times.take() == [1.0, 2.0, 1.0, 9.0]
    assert times.take() == [0.0] * 4


def test_a_function_that_raises_ends_its_span():
    spans = Spans(torch.device("cpu"))
    spans.is_open = True

    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        spans.timed("forward", fails)()
    spans.collect()
    assert spans.seconds > 0
