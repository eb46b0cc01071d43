"""A loaded model computes logits only where they are read, and sequences of few widths."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from megatron.generation.decoding import DecodingSettings, NextLogits
from megatron.generation.requests import Sampling
from megatron.harness import scoring
from megatron.harness.scoring import Row, score_rows
from megatron.inference import TrainedModel, width_for
from tests.models import random_tokens
from tests.trained import one_rank_model

CONTEXT = 200
APART = {"reset_attention_mask": True, "reset_position_ids": True}
ROWS = [
    Row(tuple(range(20, 60)), ((5,), (6,), (7,))),  # three answers to one question
    Row(tuple(range(30)), ((28, 29, 1), (3,))),  # a continuation and the end of it
    Row(tuple(range(70, 82)), (tuple(range(71, 83)),)),  # a whole text
]


@pytest.fixture(scope="module", params=[{}, APART, {"tied_embeddings": True}], ids=["plain", "apart", "tied"])
def model(request):
    with one_rank_model(max_position_embeddings=CONTEXT, **request.param) as model:
        yield model


@contextmanager
def counted(model: TrainedModel) -> Iterator[list[int]]:
    """The number of positions of each product with the head."""
    found: list[int] = []
    compute = model.engine.module.forward

    def noted(inputs, cache=None, layers=slice(None)):
        if layers.start == -1:
            found.append(inputs.shape[:-1].numel())
        return compute(inputs, cache, layers)

    model.engine.module.forward = noted
    yield found
    del model.engine.module.forward


@pytest.mark.parametrize("use_cache", [True, False])
def test_decoding_computes_the_logits_of_one_position_of_each_text(model, use_cache):
    texts = [list(range(50)), list(range(9, 40))]
    following = NextLogits(model, DecodingSettings(Sampling(), 3, use_cache))
    with counted(model) as positions:
        first = following(texts)
        following([[*text, 5] for text in texts])
    assert positions == [2, 2]
    if use_cache:
        return
    for text, logits in zip(texts, first, strict=True):
        torch.testing.assert_close(logits, model.logits(torch.tensor([text]))[0, -1])


def test_scoring_computes_the_logits_of_each_scored_position_once(model, monkeypatch):
    with counted(model) as positions:
        whole = score_rows(model, ROWS)
    assert positions == [1 + 3 + 12]
    monkeypatch.setattr(scoring, "POSITIONS", 5)
    with counted(model) as positions:
        in_parts = score_rows(model, ROWS)
    assert positions == [5, 5, 5, 1]
    for row, found, other in zip(ROWS, whole, in_parts, strict=True):
        logits = model.logits_of(model.hidden_of_documents(torch.tensor([row.tokens])))[0].double().log_softmax(-1)
        for ids, (nats, greedy), (same, also) in zip(row.continuations, found, other, strict=True):
            end = logits[len(logits) - len(ids) :]
            # a sum of up to 12 fp32 terms of up to 20 nats, whose logits were summed in another order
            assert nats == pytest.approx(float(end.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-4)
            assert same == pytest.approx(nats, abs=1e-4)
            assert greedy == also == (end.argmax(-1).tolist() == list(ids))


@pytest.mark.parametrize("length", [9, 128, 140, CONTEXT])
def test_few_widths_change_nothing(model, length):
    tokens = random_tokens(model.plan.model, 2, length)
    wide = replace(model, few_widths=True)
    # only the shapes of the products differ
    torch.testing.assert_close(
        wide.hidden_of_documents(tokens), model.hidden_of_documents(tokens), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        wide.logits(tokens, columns=slice(-2, None)), model.logits(tokens)[:, -2:], rtol=1e-4, atol=1e-4
    )


def test_there_are_two_widths_in_each_doubling_and_none_beyond_the_context():
    widths = [width_for(length, 2000) for length in range(1, 2001)]
    assert sorted(set(widths)) == [128, 256, 384, 512, 768, 1024, 1536, 2000]
    assert all(length <= width for length, width in enumerate(widths, start=1))
    assert all(2 * width <= 3 * length for length, width in enumerate(widths, start=1) if length > 256)
