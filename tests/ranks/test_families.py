"""Each Hugging Face family computes what transformers computes, on 1 and 2 ranks, with its weights and its gradients.

Random values stand in every parameter, biases and norms too, and sizes are odd. fp32; both sides compute the same sums
in another order, so that 1e-4 of the largest logit, or of a parameter's largest gradient, is far above the gaps (1e-5)
and far below any mistake.
"""

import json
from pathlib import Path

import pytest
import torch

from megatron import registry
from megatron.config.load import config_from_flat
from megatron.config.resolve import resolve
from megatron.convert.family import KIND, families_for, family_of
from megatron.convert.model_keys import model_keys
from tests.families import CASES, family_named, reference, their_config, their_model
from tests.ranks.family_checks import BOUND, measure
from tests.ranks.run import run_ranks

PARAMETERS = [(family, variant) for family, variants in CASES.items() for variant in variants]
each_case = pytest.mark.parametrize(
    ("family", "variant"), PARAMETERS, ids=[f"{family}-{variant}" for family, variant in PARAMETERS]
)
each_family = pytest.mark.parametrize("family", CASES)
PIPELINES = [family for family in ("gpt2", "llama", "gemma2") if family in CASES]


@pytest.fixture(scope="module")
def figures(request, tmp_path_factory):
    """What ranks measured of the models of all chosen tests, once for each number of ranks: a process start each."""
    folder = tmp_path_factory.mktemp("families")
    mine = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    wanted = [item.callspec.params for item in mine if "figures" in item.fixturenames]
    names = {(case["family"], case.get("variant", next(iter(CASES[case["family"]])))) for case in wanted}
    numbers = {case: str(number) for number, case in enumerate(sorted(names))}
    for (family, variant), number in numbers.items():
        torch.save(reference(family, CASES[family][variant]), folder / f"{number}.pt")
    known = set()

    def of(family, variant, ranks, pipe=1):
        if (ranks, pipe) not in known:
            known.add((ranks, pipe))
            chosen = [n for (f, v), n in numbers.items() if pipe == 1 or (f in PIPELINES and v == next(iter(CASES[f])))]
            run_ranks(ranks, measure, str(folder), chosen, pipe, timeout=60 + 5 * len(chosen))
        found = json.loads(Path(folder, f"{numbers[family, variant]}.{pipe}.{ranks}.json").read_text())
        assert "error" not in found, found["error"]
        return found

    return of


def test_every_family_has_a_case():
    assert list(CASES) == registry.names(KIND)


@each_case
@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_decoding_and_gradients_equal_those_of_transformers(figures, family, variant, ranks):
    found = figures(family, variant, ranks)
    assert len(found) == (3 if ranks == 1 else 2)
    assert all(gap <= BOUND for gap in found.values()), found


@pytest.mark.parametrize("family", PIPELINES)
def test_the_loss_of_a_pipeline_equals_that_of_transformers(figures, family):
    (gap,) = figures(family, next(iter(CASES[family])), 2, pipe=2).values()
    assert gap <= BOUND


@each_case
def test_a_round_trip_of_weights_is_bit_exact(family, variant):
    theirs = dict(their_model(their_config(family, CASES[family][variant])).named_parameters())  # a tied weight once
    table = family_named(family)
    parameters = table.parameters(table.model(their_config(family, CASES[family][variant]).to_dict()))
    ours = parameters.from_hugging_face(theirs)
    back = parameters.to_hugging_face(ours)
    assert set(back) == set(theirs)
    assert all(torch.equal(back[name], theirs[name]) and back[name].is_contiguous() for name in theirs)
    again = parameters.from_hugging_face(back)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@each_case
def test_a_round_trip_of_settings_gives_the_same_model(family, variant):
    model = family_named(family).model(their_config(family, CASES[family][variant]).to_dict())
    config = family_named(family).config(model)
    assert json.loads(json.dumps(config)) == config
    assert family_of(config).model(config) == model
    assert family in [found.model_type for found in families_for(model)]
    keys = {**model_keys(model), "make_vocab_size_divisible_by": 1}
    assert resolve(config_from_flat(keys), 1, model.vocab_size).model == model
