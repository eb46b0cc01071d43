"""Each Hugging Face family computes what transformers computes, on 1 and 2 ranks, with its weights and its gradients.

Random values stand in every parameter, biases and norms too, and sizes are odd. fp32; both sides compute the same sums
in another order, so that 1e-4 of the largest logit, or of a parameter's largest gradient, is far above the gaps (1e-5)
and far below any mistake.
"""

import pytest

from megatron import registry
from megatron.convert.family import KIND
from tests.families import ALL, CASES, PIPELINES, Measurements, check_settings_return, check_weights_return
from tests.ranks.family_checks import BOUND

each_case = pytest.mark.parametrize("case", ALL, ids=str)


@pytest.fixture(scope="module")
def measurements(request, tmp_path_factory):
    """Of the models that the chosen tests need."""
    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    needed = {item.callspec.params["case"] for item in mine if "measurements" in item.fixturenames}
    return Measurements(tmp_path_factory.mktemp("families"), [case for case in ALL if case in needed])


def test_every_family_has_a_case():
    assert list(CASES) == registry.names(KIND)


@pytest.mark.parametrize(("case", "ranks"), [(case, ranks) for case in ALL for ranks in (1, 2)], ids=str)
def test_logits_decoding_and_gradients_equal_those_of_transformers(measurements, case, ranks):
    figures = measurements.of(case, ranks)
    assert len(figures) == (3 if ranks == 1 else 2)
    assert all(gap <= BOUND for gap in figures.values()), figures


@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_the_loss_of_a_pipeline_equals_that_of_transformers(measurements, case):
    (gap,) = measurements.of(case, 2, pipe=2).values()
    assert gap <= BOUND


@each_case
def test_a_round_trip_of_weights_is_bit_exact(case):
    check_weights_return(case)


@each_case
def test_a_round_trip_of_settings_gives_the_same_model(case):
    check_settings_return(case)
