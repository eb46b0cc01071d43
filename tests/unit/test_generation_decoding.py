"""Decoding with a real model: batches, the cache, the context's end, the document's end, seeds."""

from copy import copy
from dataclasses import replace

import pytest
import torch

from megatron.generation.decoding import DecodingSettings, continue_texts
from megatron.generation.requests import Sampling
from tests.trained import one_rank_model

PROMPTS = [list(text.encode()) for text in ("a", "hello wor", "To be, or", "xyz")]
SEEDS = ["0", "1", "2", "3"]
GREEDY = DecodingSettings(Sampling(), maximum_tokens=6)
SAMPLED = DecodingSettings(Sampling(temperature=1.0, top_k=50), maximum_tokens=6)
BEYOND = 24  # tokens, where the context is 16


def tokens(model, prompts, settings, seeds=None) -> list[list[int]]:
    return [found.tokens for found in continue_texts(model, prompts, settings, seeds or SEEDS[: len(prompts)])]


def ending_with(model, token: int):
    """The model with another end-of-document token; -1 never comes."""
    tokenizer = copy(model.tokenizer)
    tokenizer.end_of_document = token
    return replace(model, tokenizer=tokenizer)


@pytest.fixture(scope="module", params=["rotary", "learned"])
def model(request):
    with one_rank_model(position_embedding=request.param, num_layers=2, attention_kinds=("global",) * 2) as model:
        yield model


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [6, BEYOND])
def test_a_batch_padded_on_the_left_gives_what_each_prompt_gives_alone(model, settings, length):
    settings = DecodingSettings(settings.sampling, length)
    together = tokens(model, PROMPTS, settings)
    alone = [tokens(model, [prompt], settings, [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert together == alone
    assert len({tuple(text) for text in together}) == len(PROMPTS)


@pytest.mark.parametrize("length", [6, BEYOND])
def test_the_cache_changes_nothing(model, length):
    cached = tokens(model, PROMPTS, DecodingSettings(Sampling(), length))
    assert tokens(model, PROMPTS, DecodingSettings(Sampling(), length, use_cache=False)) == cached


def test_greedy_tokens_are_the_argmax_of_the_whole_text_read_at_once(model):
    [generated] = tokens(model, [PROMPTS[1]], GREEDY)
    text = PROMPTS[1] + generated
    logits = model.logits(torch.tensor([text]))[0]
    assert logits[len(PROMPTS[1]) - 1 : -1].argmax(dim=-1).tolist() == generated


def test_beyond_the_context_each_token_is_predicted_from_the_last_tokens(model):
    [generated] = tokens(model, [PROMPTS[0]], DecodingSettings(Sampling(), BEYOND))
    text = PROMPTS[0] + generated
    assert len(text) == BEYOND + 1 > model.context
    for place in (model.context, BEYOND):
        window = torch.tensor([text[place - model.context : place]])
        assert int(model.logits(window)[0, -1].argmax()) == text[place]


def test_a_prompt_as_long_as_the_context_can_be_continued(model):
    prompt = list(range(model.context))
    assert len(tokens(model, [prompt], GREEDY)[0]) == GREEDY.maximum_tokens


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model):
    settings = DecodingSettings(Sampling(temperature=1.5), 12)
    first = tokens(model, [PROMPTS[0]] * 3, settings, ["a", "a", "b"])
    assert first[0] == first[1] != first[2]
    assert tokens(model, [PROMPTS[0]], settings, ["b"]) == [first[2]]


def test_generation_ends_with_the_document_and_does_not_show_its_end_token(model):
    free = tokens(ending_with(model, -1), PROMPTS, DecodingSettings(Sampling(), 12))
    found = continue_texts(ending_with(model, free[0][5]), PROMPTS, DecodingSettings(Sampling(), 12), SEEDS)
    for text, continuation in zip(free, found, strict=True):
        stop = text.index(free[0][5]) if free[0][5] in text else len(text)
        assert continuation.tokens == text[:stop]
        assert continuation.finished == (stop < len(text))
    assert found[0].finished


def test_ids_that_only_the_model_knows_are_not_generated(model):
    tokenizer = copy(model.tokenizer)
    tokenizer.vocab_size = 100  # the model has more
    small = replace(model, tokenizer=tokenizer)
    for settings in (DecodingSettings(Sampling(), 12), DecodingSettings(Sampling(temperature=2.0), 12)):
        free, bound = tokens(ending_with(model, -1), PROMPTS, settings), tokens(small, PROMPTS, settings)
        assert max(map(max, free)) >= 100 > max(map(max, bound))


def test_logits_are_kept_for_each_generated_token_if_asked_for(model):
    [found] = continue_texts(model, [PROMPTS[0]], DecodingSettings(Sampling(), 5, keep_logits=True), ["0"])
    assert len(found.logits) == len(found.tokens) == 5
    assert all(len(row) == model.tokenizer.vocab_size for row in found.logits)
    assert [row.index(max(row)) for row in found.logits] == found.tokens
