"""A loaded model computes logits only where they are read, and sequences of few widths."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from megatron.generation import lane
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Request
from megatron.inference import TrainedModel, width_for
from tests.models import random_tokens
from tests.trained import one_rank_model

CONTEXT = 200
APART = {"reset_attention_mask": True, "reset_position_ids": True}
SCORED = [
    *(Request((*range(20, 60), answer), 0, score_from=40) for answer in (5, 6, 7)),  # three answers to one question
    Request((*range(30), 1), 0, score_from=28),
    Request(tuple(range(70, 83)), 0, score_from=1),  # a whole text
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


def test_decoding_computes_the_logits_of_one_position_of_each_text(model):
    texts = [list(range(50)), list(range(9, 40))]
    engine = Engine(model, EngineSettings(2, CONTEXT))
    with counted(model) as positions:
        answers = engine.run([Request(tuple(text), 2, keep_logits=True, ignore_end=True) for text in texts])
    assert positions == [2, 2]
    for text, answer in zip(texts, answers, strict=True):
        known = model.logits(torch.tensor([text]))[0, -1, : model.tokenizer.vocab_size]
        torch.testing.assert_close(torch.tensor(answer.tokens[0].logits), known)


def test_scoring_computes_the_logits_of_the_scored_positions_alone_and_not_all_at_once(model, monkeypatch):
    found = {}
    for at_once in (1024, 5):
        monkeypatch.setattr(lane, "SCORED_AT_ONCE", at_once)
        engine = Engine(model, EngineSettings(8, CONTEXT))
        with counted(model) as positions:
            found[at_once] = engine.run(SCORED)
        assert sum(positions) == sum(len(request.ids) - request.score_from for request in SCORED)
        assert max(positions) <= at_once
    for request, whole, in_parts in zip(SCORED, found[1024], found[5], strict=True):
        ids = torch.tensor([request.ids])
        logits = model.logits_of(model.hidden_of_documents(ids[:, :-1]))[0, request.score_from - 1 :].log_softmax(-1)
        expected = logits.gather(1, ids[0, request.score_from :, None])[:, 0].tolist()
        for answer in (whole, in_parts):
            # fp32, whose sums are in another order
            assert [token.log_probability for token in answer.scored] == pytest.approx(expected, abs=1e-5)
            assert [token.greedy for token in answer.scored] == (
                logits.argmax(-1) == ids[0, request.score_from :]
            ).tolist()


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
