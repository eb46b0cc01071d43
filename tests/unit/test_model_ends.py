"""The embedding's factor and norm, and the head's bias, factor and cap, against their formulas."""

import pytest
import torch
import torch.nn.functional as F

from megatron.model.embedding_and_head import Embedding, Head
from megatron.model.positions import learned, none
from megatron.parallel.parameter import name_parameters
from tests.models import build, random_tensor, random_tokens, randomise, small
from tests.ranks.run import one_rank

MODEL = small(
    embedding_norm=True,
    embedding_multiplier=3.0,
    head_bias=True,
    logit_multiplier=0.5,
    logit_softcap=2.0,
    position_embedding="learned",
)


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


def named(module):
    """With random values in every parameter."""
    name_parameters(module, "", seed=1)
    randomise(module)
    return module


def test_the_factor_is_of_the_token_alone_and_the_norm_comes_last(grid):
    embedding, tokens = named(Embedding(MODEL, grid, learned)), random_tokens(MODEL, batch=2, length=5)
    added = 3.0 * embedding.weight[tokens] + embedding.positions.weight[:5]
    expected = F.layer_norm(added, (32,), embedding.norm.weight, embedding.norm.bias, MODEL.norm_epsilon)
    torch.testing.assert_close(embedding(tokens), expected)


def test_a_copy_that_is_only_the_head_of_a_tied_model_has_no_norm(grid):
    assert [name for name, _ in Embedding(MODEL, grid, None).named_parameters()] == ["weight"]


def test_the_factor_is_rounded_to_the_type_of_the_weights(grid):
    model = small(embedding_multiplier=3072**0.5, position_embedding="none")
    embedding, tokens = named(Embedding(model, grid, none)).bfloat16(), random_tokens(model, batch=1, length=4)
    assert torch.equal(embedding(tokens), embedding.weight[tokens] * 55.5)


def test_logits_are_capped_after_factor_and_bias(grid):
    head, hidden = named(Head(MODEL, grid)), random_tensor((2, 5, 32), 0)
    logits = head(hidden)
    expected = 2.0 * torch.tanh(0.5 * (hidden @ head.weight[:61].t() + head.bias[:61]) / 2.0)
    torch.testing.assert_close(logits[..., :61], expected)
    assert (logits[..., 61:] == float("-inf")).all() and not head.bias[61:].any()


def test_the_loss_and_its_gradients_are_those_of_the_logits(grid):
    ids, weights = random_tokens(MODEL, batch=2, length=9), torch.rand(2, 8)
    gradients = []
    for whole in (False, True):
        module = build(MODEL, grid)
        if whole:
            logits = module(ids[:, :-1]).flatten(0, 1)
            loss = (F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none") * weights.flatten()).sum()
        else:
            loss = module(ids[:, :-1], targets=(ids[:, 1:], weights))
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        # gradients of 1 or so in fp32, summed in another order
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
