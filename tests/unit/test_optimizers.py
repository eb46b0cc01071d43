"""Learning-rate schedules and parameter groups."""

from itertools import pairwise

import pytest
import torch

from megatron import registry
from megatron.config.plan import OptimizerPlan, SchedulePlan
from megatron.errors import UserError
from megatron.optimizers.build import build_optimizer
from megatron.optimizers.schedules import learning_rate
from megatron.optimizers.traits import traits_of


@pytest.mark.parametrize("kind", registry.names("lr_schedule"))
def test_a_schedule_warms_up_to_its_peak_and_never_leaves_its_bounds(kind):
    schedule = SchedulePlan(kind, peak=1.0, minimum=0.1, warmup_steps=4, decay_steps=20)
    rates = [learning_rate(schedule, step) for step in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx({"constant": 1.0, "exponential": 0.5}.get(kind, 0.1))


def test_cosine_is_half_way_at_half_time_and_linear_is_straight():
    cosine = SchedulePlan("cosine", peak=1.0, minimum=0.0, warmup_steps=0, decay_steps=100)
    linear = SchedulePlan("linear", peak=1.0, minimum=0.0, warmup_steps=0, decay_steps=100)
    assert learning_rate(cosine, 50) == pytest.approx(0.5)
    assert learning_rate(cosine, 25) == pytest.approx((1 + 2**-0.5) / 2)
    assert learning_rate(linear, 25) == pytest.approx(0.75)


def test_exponential_halves_over_the_decay_and_stops_at_the_minimum():
    half = SchedulePlan("exponential", peak=1.0, minimum=0.0, warmup_steps=0, decay_steps=100)
    assert learning_rate(half, 50) == pytest.approx(2**-0.5)
    assert learning_rate(half, 1000) == pytest.approx(0.5)
    floor = SchedulePlan("exponential", peak=1.0, minimum=0.7, warmup_steps=0, decay_steps=100)
    assert learning_rate(floor, 100) == pytest.approx(0.7)


def test_matrices_decay_and_vectors_do_not():
    module = torch.nn.Linear(3, 2)
    plan = OptimizerPlan("adam", 0.1, (0.9, 0.95), 1e-8, weight_decay=0.1, gradient_clipping=1.0)
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(module.parameters(), plan).param_groups
        for p in group["params"]
    }
    assert decay == {id(module.weight): 0.1, id(module.bias): 0.0}


KINDS = registry.names("optimizer")


@pytest.fixture
def plugin(monkeypatch):
    """The registry with the names of a plugin, for one test."""
    monkeypatch.setitem(registry.TABLE, "optimizer", dict(registry.TABLE["optimizer"]))
    registry.load_plugins(["tests.own_optimizers"])


def optimizer_plan(kind: str) -> OptimizerPlan:
    return OptimizerPlan(kind, 0.1, (0.9, 0.95), 1e-8, weight_decay=0.1, gradient_clipping=1.0)


@pytest.mark.parametrize("kind", [*KINDS, "signs", "adagrad"])
def test_the_state_an_optimizer_keeps_is_found_out_and_can_be_made_before_its_first_step(plugin, kind):
    traits = traits_of(optimizer_plan(kind))
    ends = []
    for made_before in (False, True):
        parameter = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = build_optimizer([parameter], optimizer_plan(kind))
        if made_before:
            optimizer.state.clear()
            traits.fill(optimizer.state[parameter], parameter)
        for value in (1.0, -2.0):
            parameter.grad = torch.full_like(parameter, value)
            optimizer.step()
        state = optimizer.state[parameter]
        assert {name for name, value in state.items() if value is not None} == {*traits.moments, *traits.counters}
        assert all(state[name] == 2 for name in traits.counters)
        ends.append([parameter.detach(), *(state[name] for name in traits.moments)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("muon", "Muon only supports 2D parameters"),
        ("nadam", "it keeps mu_product"),
        ("whole_norm", "a matrix and its flattened copy get different updates"),
    ],
)
def test_an_optimizer_that_sharding_would_change_is_refused_with_the_reason(plugin, kind, reason):
    with pytest.raises(UserError, match=f'optimizer "{kind}" cannot be sharded.*{reason}'):
        traits_of(optimizer_plan(kind))
