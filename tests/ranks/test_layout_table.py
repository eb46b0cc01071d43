"""Every row of docs/layouts.md: a layout trains as one rank does. What is compared, and the bounds: layouts.py."""

import itertools

import pytest

from tests.ranks.layouts import FACTORS, FAMILIES, Case, bound, carry_out, cases, cases_of_families, is_possible

ALL = cases()


@pytest.mark.long
@pytest.mark.parametrize("case", [*ALL, *cases_of_families()], ids=str)
def test_a_layout_trains_like_one_rank(case):
    outcome = carry_out(case)
    assert outcome.finite
    assert outcome.skipped_alike
    assert outcome.gap < outcome.bound


def test_every_pair_of_values_that_may_stand_together_does():
    assert 35 <= len(ALL) <= 60
    assert all(map(is_possible, ALL))
    for first, second in itertools.combinations(FACTORS, 2):
        together = {(case.name(first), case.name(second)) for case in ALL}
        assert together <= set(itertools.product(FACTORS[first], FACTORS[second]))
        missing = set(itertools.product(FACTORS[first], FACTORS[second])) - together
        assert len(missing) <= 8, f"{first} x {second}: {missing}"


def test_every_family_meets_every_arrangement_of_ranks_that_it_can():
    met = {(case.name("model"), case.name("ranks")) for case in cases_of_families()}
    missing = set(itertools.product(FAMILIES, FACTORS["ranks"])) - met
    assert all(map(is_possible, cases_of_families()))
    assert missing == {(model, "pp4") for model in FAMILIES}, "two layers make two stages"


def test_a_bound_is_not_wider_than_what_it_is_for():
    plain = Case(tuple(next(iter(values)) for values in FACTORS.values()))
    assert bound(plain.settings("precision", "model")) == 1e-5
