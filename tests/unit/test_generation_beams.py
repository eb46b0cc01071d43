"""Beam search: the tokens of Transformers, from the logits of the same model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megatron.generation.beams import BeamSearch, Hypothesis
from megatron.generation.constraints import Constraints
from megatron.generation.requests import Beams, Constraint, Request, Sampling
from megatron.generation.sampling import Chooser, Row
from megatron.tokenizer.build import build_tokenizer

VOCABULARY = 14
END = 3
PROMPT = (5, 1, 7)


@pytest.fixture(scope="module")
def models() -> list[GPT2LMHeadModel]:
    """Small models whose weights are large enough to prefer some tokens."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        initializer_range=0.35,
        bos_token_id=END,
        eos_token_id=END,
    )
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        found.append(GPT2LMHeadModel(config).eval())
    return found


@torch.no_grad()
def searched(model: GPT2LMHeadModel, request: Request, ends: set[int]) -> tuple[Hypothesis, int]:
    """What the search finds, and its number of steps."""
    search = BeamSearch(request.beams, ends, request.maximum_tokens)
    rows, chooser, steps = [Row(request)], Chooser(VOCABULARY, END), 0
    while not search.done:
        logits = model(torch.tensor([row.ids for row in rows])).logits[:, -1].float()
        chosen = search.advance(chooser.candidates(logits, rows, search.width))
        parents = [rows[parent].copy() for parent, _ in chosen]
        for row, (_, token) in zip(parents, chosen, strict=True):
            row.append(token)
        rows, steps = parents, steps + 1
    return search.best(), steps


CASES = [
    Beams(2),
    Beams(3, early_stopping=True),
    Beams(4, length_penalty=0.0),
    Beams(3, length_penalty=2.5),
    Beams(5, length_penalty=-1.0),
    Beams(4, length_penalty=2.0, early_stopping=True),
]


SETTINGS = {  # repetition penalty, fewest tokens, ends of a text
    "plain": (1.0, 0, {END}),
    "repetition penalty": (1.4, 0, {END}),
    "minimum of tokens": (1.0, 4, {END}),
    "three ends": (1.0, 0, {END, 9, 11}),
}


def with_settings():
    """All searches plainly, and two of them under each setting, are quick cases; the rest are long."""
    for name, values in SETTINGS.items():
        for number, beams in enumerate(CASES):
            quick = name == "plain" or number in (1, 4)
            yield pytest.param(*values, beams, id=f"{name}-{beams}", marks=() if quick else pytest.mark.long)


@pytest.mark.parametrize(("penalty", "minimum", "ends", "beams"), with_settings())
def test_the_text_and_score_are_those_of_transformers(models, beams, penalty, minimum, ends):
    request = Request(
        PROMPT,
        9,
        Sampling(repetition_penalty=penalty),
        minimum_tokens=minimum,
        stop_tokens=frozenset(ends - {END}),
        beams=beams,
    )
    ended = 0
    for model in models:
        expected = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
            num_beams=beams.count,
            do_sample=False,
            length_penalty=beams.length_penalty,
            early_stopping=beams.early_stopping,
            repetition_penalty=penalty,
            max_new_tokens=request.maximum_tokens,
            min_new_tokens=minimum or None,
            eos_token_id=sorted(ends),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found, steps = searched(model, request, ends)
        tokens = expected.sequences[0, len(PROMPT) :].tolist()
        assert list(found.ids) == (tokens[:-1] if found.ended else tokens)
        assert found.ended == (tokens[-1] in ends)
        assert found.score == pytest.approx(float(expected.sequences_scores[0]), rel=1e-5)
        assert steps == len(expected.scores)
        ended += found.ended
    assert ended or minimum or beams.length_penalty > 2, "no text reached its end"


def test_the_new_beams_name_the_beam_that_they_continue():
    search = BeamSearch(Beams(2), {END}, 9)
    assert search.advance([[(5, -0.1), (6, -0.3), (7, -2.0), (8, -3.0)]]) == [(0, 5), (0, 6)]
    assert search.advance([[(5, -1.0), (6, -2.0)], [(8, -0.1), (END, -0.2)]]) == [(1, 8), (0, 5)]
    assert not search.done


def test_beams_keep_to_a_constraint_and_end_where_the_vocabulary_cannot_go_on():
    tokenizer = build_tokenizer("CharLevelTokenizer")
    for expression, expected in (("(ab|ac|b)d", b"abd"), ("[ab]", b"a")):
        constraint = Constraint("regex", expression)
        request = Request((1,), 9, constraint=constraint, beams=Beams(3))
        rows = [Row(request, Constraints(tokenizer).matcher(constraint))]
        search, chooser = BeamSearch(request.beams, {256}, 9), Chooser(257, 256)
        while not search.done:
            logits = torch.linspace(3.0, 0.0, 257).expand(len(rows), -1)
            chosen = search.advance(chooser.candidates(logits, rows, search.width))
            rows = [rows[parent].copy() for parent, _ in chosen]
            for row, (_, token) in zip(rows, chosen, strict=True):
                row.append(token)
        assert bytes(search.best().ids) == expected and search.best().ended


def test_a_search_without_candidates_is_over_with_what_it_has():
    search = BeamSearch(Beams(2), {END}, 9)
    search.advance([[(5, -0.1), (6, -0.3)]])
    assert search.advance([[], []]) == []
    assert search.done and search.best() == Hypothesis((5,), -0.1, ended=False)
