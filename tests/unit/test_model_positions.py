"""Positions: rotary ones in all their variants against transformers, added ones against their formulas."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_neighbours
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megatron.config.plan import ModelPlan, RopeScaling
from megatron.model.positions import LearnedTable, RotaryTable, Sinusoids, rotary, rotations
from megatron.parallel.parameter import name_parameters
from tests.models import build, new_cache, random_tensor, random_tokens, randomise, read_in_steps, small
from tests.ranks.run import one_rank

LENGTHS = (40, 64, 65, 100, 128)  # below, at and above the 64 positions of the original model
PAIRS = 16
SHORT, LONG = (tuple(1 + step * pair for pair in range(PAIRS)) for step in (0.05, 0.7))


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def yarn(**changes: Any) -> RopeScaling:
    return RopeScaling("yarn", 4.0, original_positions=64, **changes)


SCALINGS = {
    "none": (None, {}),
    "linear": (RopeScaling("linear", 4.0), {"factor": 4.0}),
    "dynamic": (RopeScaling("dynamic", 4.0, original_positions=64), {"factor": 4.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, low_frequency=1.0, high_frequency=4.0, original_positions=64),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": (yarn(), {"factor": 4.0}),
    "yarn, attention factor": (yarn(attention_factor=1.3), {"factor": 4.0, "attention_factor": 1.3}),
    "yarn, betas": (yarn(beta_fast=6.0, beta_slow=2.0), {"factor": 4.0, "beta_fast": 6.0, "beta_slow": 2.0}),
    "yarn, not truncated": (yarn(truncate=False), {"factor": 4.0, "truncate": False}),
    "yarn, mscale": (
        yarn(mscale=1.0, mscale_all_dim=0.7),
        {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "longrope": (
        RopeScaling("longrope", 2.0, original_positions=64, short_factors=SHORT, long_factors=LONG),
        {"short_factor": SHORT, "long_factor": LONG, "factor": 2.0},
    ),
    "longrope, attention factor": (
        RopeScaling(
            "longrope", 2.0, original_positions=64, short_factors=SHORT, long_factors=LONG, attention_factor=1.1
        ),
        {"short_factor": SHORT, "long_factor": LONG, "factor": 2.0, "attention_factor": 1.1},
    ),
}


def scaled(scaling: RopeScaling | None) -> ModelPlan:
    return small(head_size=64, rotary_fraction=0.5, max_position_embeddings=128, rope_scaling=scaling)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_rotary_positions_are_those_of_transformers_at_every_length(grid, name, length):
    scaling, theirs = SCALINGS[name]
    kind = "default" if scaling is None else scaling.kind
    original = {} if kind in ("default", "linear", "dynamic") else {"original_max_position_embeddings": 64}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **theirs, **original}
    config = LlamaConfig(head_dim=64, max_position_embeddings=64, rope_parameters=rope)
    if kind == "default":
        config.rope_parameters["partial_rotary_factor"] = 1.0
        config.head_dim = 32  # the default kind of Llama has no part that is not rotated
    heads = random_tensor((1, length, 2, 64), 3)
    cosine, sine = LlamaRotaryEmbedding(config)(heads, torch.arange(length).unsqueeze(0))
    turned = heads[..., :32]
    expected, _ = apply_rotary_pos_emb(turned, turned, cosine, sine, unsqueeze_dim=2)
    actual = RotaryTable(scaled(scaling), grid)(heads)
    # angles up to 128 radians in fp32 are off by up to 128 * 2^-24 = 8e-6, after formulas in another order; heads are
    # up to 4 long. The kinds differ from one another by more than 0.1
    torch.testing.assert_close(actual[..., :32], expected, rtol=0, atol=1e-4)
    assert torch.equal(actual[..., 32:], heads[..., 32:])


def test_neighbouring_pairs_are_those_of_gpt_j(grid):
    table = RotaryTable(small(rotary_interleaved=True, rotary_fraction=0.5), grid)
    heads = random_tensor((2, 9, 4, 8), 1)
    sine, cosine = create_sinusoidal_positions(9, 4).chunk(2, dim=-1)
    expected = rotate_neighbours(heads[..., :4], sine.unsqueeze(0), cosine.unsqueeze(0))
    # one rounding of each operation on values of 1
    torch.testing.assert_close(table(heads)[..., :4], expected, rtol=0, atol=1e-6)
    assert torch.equal(table(heads)[..., 4:], heads[..., 4:])


def test_local_layers_have_their_own_base_without_scaling_and_some_layers_have_no_rotation(grid):
    model = small(
        num_layers=4,
        attention_kinds=("local", "global", "local", "global"),
        rotary_base_local=100.0,
        layers_without_rotary=(3,),
        rope_scaling=RopeScaling("linear", 8.0),
    )
    local, usual, same, without = rotations(rotary, model, grid)
    assert local is same and without is None
    heads = random_tensor((1, 6, 2, 8), 0)
    assert torch.equal(local(heads, None, None), RotaryTable(small(rotary_base=100.0), grid)(heads))
    assert torch.equal(usual(heads, None, None), RotaryTable(small(rope_scaling=model.rope_scaling), grid)(heads))


def test_layers_share_one_rotation_unless_their_base_differs(grid):
    first, *others = rotations(rotary, small(attention_kinds=("local", "global", "flash")), grid)
    assert all(other is first for other in others)


def test_sinusoidal_positions_are_sines_then_cosines(grid):
    module, hidden = Sinusoids(small(), grid), random_tensor((2, 5, 32), 0)
    angles = [[position / 10000 ** (2 * i / 32) for i in range(16)] for position in range(5)]
    table = torch.tensor([[math.sin(a) for a in row] + [math.cos(a) for a in row] for row in angles])
    torch.testing.assert_close(module(hidden), hidden + table)
    positions = torch.tensor([[4, 0, 1, 2, 3], [2, 2, 2, 0, 0]])
    torch.testing.assert_close(module(hidden, positions), hidden + table[positions])


def test_learned_positions_begin_after_the_rows_of_the_offset(grid):
    table = LearnedTable(small(position_offset=2), grid)
    name_parameters(table, "positions", seed=1)
    randomise(table)
    hidden = random_tensor((2, 4, 32), 0)
    assert table.weight.shape == (18, 32)
    assert torch.equal(table(hidden), hidden + table.weight[2:6])
    positions = torch.tensor([[3, 0, 1, 15], [5, 6, 7, 8]])
    assert torch.equal(table(hidden, positions), hidden + table.weight[positions + 2])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_cache_rotates_all_its_tokens_by_its_capacity(grid, kind):
    """So decoding over the original length gives the logits of reading the same number of tokens at once."""
    scaling = RopeScaling(kind, 2.0, original_positions=8, short_factors=(1.0, 1.5), long_factors=(2.0, 4.0))
    model = small(rope_scaling=scaling)
    with torch.inference_mode():
        module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=12)
        decoded = read_in_steps(module, tokens, new_cache(model, 2, 12), [5, 4, 1, 2])
        whole = module(tokens)[..., : model.vocab_size]
        # the sums of attention are cut differently, below 2e-6; positions of the short sequence are off by a tenth
        assert (decoded[..., : model.vocab_size] - whole).abs().max() <= 1e-5 * whole.abs().max()
