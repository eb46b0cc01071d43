"""Decoding with a key-value cache gives the logits of reading the whole text at once.

fp32. The two ways share every sum but attention's, which torch's kernels cut differently: gaps seen are below 2e-6 of
the largest logit, and a token at a wrong position (every new token at position 0, say) is off by a tenth of it.
"""

import pytest
import torch
from torch import Tensor

from megatron.config.plan import ModelPlan
from megatron.engine.modules import Sequential
from megatron.model.cache import KVCache, Positions
from tests.models import VARIETY, build, random_tokens, small
from tests.ranks.run import one_rank

TOLERANCE = 1e-5
LENGTH = 16
MODELS = {
    **VARIETY,
    "learned, grouped queries": small(position_embedding="learned", num_kv_heads=1),
    "narrow window": small(position_embedding="learned", attention_kinds=("local",) * 3, sliding_window=1),
    "flash": small(attention_kinds=("flash",) * 3, num_kv_heads=2),
}


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid, torch.inference_mode():
        yield grid


def cache_for(model: ModelPlan, batch: int, padding: Tensor | None = None, length: int = LENGTH) -> KVCache:
    return KVCache(
        model.num_layers,
        batch,
        length,
        model.num_kv_heads,
        model.head_size,
        torch.float32,
        torch.device("cpu"),
        padding,
    )


def decode(module: Sequential, tokens: Tensor, cache: KVCache, steps: list[int]) -> Tensor:
    """Read `tokens` in steps of the given lengths."""
    return torch.cat([module(part, cache) for part in tokens.split(steps, dim=1)], dim=1)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def true_logits(module: Sequential, tokens: Tensor, model: ModelPlan, cache: KVCache | None = None) -> Tensor:
    return module(tokens, cache)[..., : model.vocab_size]


@pytest.mark.parametrize("steps", [[1] * LENGTH, [9] + [1] * 7, [5, 4, 1, 6], [LENGTH]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_decoding_equals_reading_everything_at_once(grid, name, steps):
    model = MODELS[name]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=LENGTH)
    decoded = decode(module, tokens, cache_for(model, 2), steps)[..., : model.vocab_size]
    assert_near(decoded, true_logits(module, tokens, model))


@pytest.mark.parametrize("steps", [[7] + [1] * 5, [7, 3, 2]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_left_padding_changes_nothing(grid, name, steps):
    model, lengths = MODELS[name], [12, 9, 6]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=3, length=12)
    padding = torch.tensor([12 - length for length in lengths])
    decoded = decode(module, tokens, cache_for(model, 3, padding), steps)[..., : model.vocab_size]
    for row, length in enumerate(lengths):
        alone = true_logits(module, tokens[row : row + 1, 12 - length :], model)
        assert_near(decoded[row : row + 1, 12 - length :], alone)


def test_what_stands_in_the_padding_does_not_matter(grid):
    model = MODELS["neox"]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=2, length=10)
    padding = torch.tensor([0, 4])
    other = tokens.clone()
    other[1, :4] = (tokens[1, :4] + 7) % model.vocab_size
    results = [decode(module, ids, cache_for(model, 2, padding), [6, 1, 3])[1, 4:] for ids in (tokens, other)]
    assert torch.equal(*results)


def test_a_cache_that_is_full_says_so(grid):
    model = MODELS["neox"]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=1, length=6)
    cache = cache_for(model, 1, length=5)
    module(tokens[:, :4], cache)
    assert cache.length == 4 and cache.max_length == 5
    with pytest.raises(ValueError, match="holds 4 of 5 tokens; 2 more do not fit"):
        module(tokens[:, 4:], cache)


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_more_tokens_than_positions_are_refused(grid, name):
    model = MODELS[name]
    module, tokens = build(model, grid).eval(), random_tokens(model, batch=1, length=LENGTH + 1)
    with pytest.raises(ValueError, match=r"17 tokens are more than max_position_embeddings \(16\)"):
        module(tokens)
    cache = cache_for(model, 1, length=LENGTH + 1)
    module(tokens[:, :LENGTH], cache)
    with pytest.raises(ValueError, match=r"17 tokens are more than max_position_embeddings \(16\)"):
        module(tokens[:, LENGTH:], cache)


def test_the_type_of_the_cache_may_be_bf16(grid):
    model = MODELS["llama"]
    module, tokens = build(model, grid).eval().to(torch.bfloat16), random_tokens(model, batch=2, length=8)
    cache = KVCache(3, 2, 8, model.num_kv_heads, model.head_size, torch.bfloat16, torch.device("cpu"))
    decoded = decode(module, tokens, cache, [4, 1, 1, 2])[..., : model.vocab_size]
    whole = true_logits(module, tokens, model)
    assert decoded.dtype == torch.bfloat16
    # bf16 keeps 8 bits: each of a dozen roundings on the way moves a logit by up to 1/256 of its parts
    assert (decoded - whole).abs().max() <= 0.05 * whole.abs().max()


def test_visibility_follows_order_padding_and_window():
    keys = torch.tensor([[-1, 0, 1, 2]])
    positions = Positions(queries=keys, keys=keys)
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    assert positions.visible()[0, 0].int().tolist() == expected
    assert positions.visible(window=2)[0, 0].int().tolist() == [*expected[:3], [0, 0, 1, 1]]
