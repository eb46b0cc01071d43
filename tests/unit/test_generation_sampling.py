"""Which token follows which logits: Transformers' distributions, frequencies that match them, rows on their own."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron.generation.requests import Request, Sampling, Token
from megatron.generation.sampling import Chooser, Row, draw, keep_min_p, keep_top_k, keep_top_p, wrong_settings
from tests.operations import Operations

VOCABULARY = 40
END = VOCABULARY - 1
LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))

samplings = st.builds(
    Sampling,
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-5, 5), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.8, -1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.3]),
    temperature=st.sampled_from([0.0, 1.0, 0.6, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 17, 400]),
    top_p=st.sampled_from([0.0, 0.31, 0.83, 1.0]),
    min_p=st.sampled_from([0.0, 0.07, 0.4]),
)
ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)
requests = st.builds(
    Request,
    ids=ids.map(tuple),
    maximum_tokens=st.just(20),
    sampling=samplings,
    seed=st.text("abc", max_size=3),
    minimum_tokens=st.sampled_from([0, 0, 2, 9]),
    stop_tokens=st.sets(st.integers(0, VOCABULARY - 1), max_size=2).map(frozenset),
    ignore_end=st.booleans(),
    alternatives=st.sampled_from([None, 0, 3]),
)


def row_of(request: Request, text=()) -> Row:
    """A row that has generated `text` already."""
    row = Row(request)
    for token in text:
        row.append(token)
    return row


def grow(chooser: Chooser, logits: torch.Tensor, rows: list[Row]) -> list[Token]:
    """Choose the next token of each row and append it."""
    tokens = chooser.choose(logits, rows)
    for row, token in zip(rows, tokens, strict=True):
        row.append(token.id)
    return tokens


def random_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def in_transformers(logits: torch.Tensor, request: Request, text: list[int]) -> torch.Tensor:
    """The processed logits [v] of Transformers, in the order of its `_get_logits_processor`.

    It lacks penalties by occurrence in the text; OpenAI subtracts them from the logits.
    """
    sampling, prompt = request.sampling, list(request.ids)
    sequence = torch.tensor([prompt + text])
    processors = LogitsProcessorList()
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): value for token, value in sampling.logit_bias}))
    processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    scores = processors(sequence, logits)
    for token, count in Counter(text).items():
        scores[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    ends = [*request.stop_tokens, *([] if request.ignore_end else [END])]
    processors = LogitsProcessorList()
    if request.minimum_tokens and ends:
        processors.append(MinNewTokensLengthLogitsProcessor(len(prompt), request.minimum_tokens, ends))
    if not sampling.is_greedy:
        processors.append(TemperatureLogitsWarper(sampling.temperature or 1.0))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(sequence, scores)[0]


class Watched(Chooser):
    """Keeps the logits that the token is chosen from."""

    def final(self, logits: torch.Tensor, row: Row) -> torch.Tensor:
        batch = self._batch_of([row], logits)
        processed = batch.processed(logits)
        return (processed if batch.sampled is None else batch.limited(processed))[0]


@settings(max_examples=300, deadline=None)
@given(requests, st.lists(st.integers(0, VOCABULARY - 1), max_size=8), st.integers(0, 10**6))
def test_settings_give_the_distribution_of_transformers_and_the_same_kept_tokens(request, text, seed):
    logits = random_logits(seed)
    before = logits.clone()
    found = Watched(VOCABULARY, END).final(logits, row_of(request, text))
    expected = in_transformers(logits.clone(), request, text)
    assert torch.equal(logits, before)
    assert torch.equal(found > -math.inf, expected > -math.inf)
    torch.testing.assert_close(found.softmax(0), expected.softmax(0), atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, min_size=2, max_size=6), st.integers(0, 10**6))
def test_a_row_is_bit_for_bit_the_same_alone_and_beside_others_while_rows_come_and_go(requests, seed):
    steps = [random_logits(seed + step, len(requests)) for step in range(6)]
    alone = []
    for i, request in enumerate(requests):
        row, chooser = Row(request), Chooser(VOCABULARY, END)
        alone.append([grow(chooser, logits[i : i + 1], [row])[0] for logits in steps])
    rows, together = [Row(request) for request in requests], [[] for _ in requests]
    chooser = Chooser(VOCABULARY, END)
    lasts = [len(steps) - i % 3 for i in range(len(requests))]
    for step, logits in enumerate(steps):
        present = [i for i, last in enumerate(lasts) if step < last]
        for i, token in zip(present, grow(chooser, logits[present], [rows[i] for i in present]), strict=True):
            together[i].append(token)
    assert together == [tokens[:last] for tokens, last in zip(alone, lasts, strict=True)]
    assert [row.ids[len(row.request.ids) :] for row in rows] == [[token.id for token in text] for text in together]


def test_greedy_rows_that_ask_for_nothing_else_cost_one_argmax():
    rows = [Row(Request((1, 2), 9, seed=str(i))) for i in range(5)]
    chooser = Chooser(VOCABULARY, END)
    chooser.choose(random_logits(0, 5), rows)
    logits = random_logits(1, 5)
    with Operations() as computed:
        chosen = chooser.choose(logits, rows)
    assert [token.id for token in chosen] == logits.argmax(dim=1).tolist()
    views = {"aten::slice", "aten::alias"}
    assert {name: count for name, count in computed.count.items() if name not in views} == {"aten::argmax": 1}


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(top_k=4), Sampling(top_p=1.0)])
def test_one_setting_is_enough_to_sample_and_a_temperature_of_zero_then_counts_as_one(sampling):
    final = Watched(4, 0).final(LOGITS, Row(Request((1,), 9, sampling)))
    assert not sampling.is_greedy
    torch.testing.assert_close(final.softmax(0), LOGITS[0].exp())


@pytest.mark.parametrize(("top_p", "count"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.8, 3), (0.95, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, count):
    kept = keep_top_p(LOGITS, torch.tensor([[top_p]], dtype=torch.float64))
    assert (kept > -math.inf).tolist() == [[i < count for i in range(4)]]


def test_of_tokens_as_likely_as_each_other_top_k_and_min_p_keep_all_and_top_p_the_first():
    even = torch.zeros(1, 4)
    assert keep_top_k(even, torch.tensor([[2]])).tolist() == [[0.0] * 4]
    assert keep_min_p(even, torch.tensor([[1.0]])).tolist() == [[0.0] * 4]
    half = torch.tensor([[0.5]], dtype=torch.float64)
    assert keep_top_p(even, half).tolist() == [[0.0, 0.0, -math.inf, -math.inf]]


def test_draws_choose_tokens_as_often_as_the_distribution_says():
    count, bins = 40_000, 12
    logits = random_logits(3)[:, :bins] / 3
    draws = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = torch.bincount(draw(logits.expand(count, -1), draws), minlength=bins)
    expected = logits[0].softmax(0) * count
    assert ((found - expected) ** 2 / expected).sum() < 31.3  # chi-square, 11 degrees of freedom: 1 in 1000 exceed it


def test_a_row_draws_one_number_of_its_seed_for_each_token():
    sampling = Sampling(temperature=1.0)
    count = 4000
    rows = [Row(Request((1,), 9, sampling, seed=str(i))) for i in range(count)]
    chooser = Chooser(4, 0)
    first, second = (chooser.choose(LOGITS.expand(count, -1), rows) for _ in range(2))
    for tokens in (first, second):
        shares = torch.bincount(torch.tensor([token.id for token in tokens])) / count
        torch.testing.assert_close(shares, LOGITS[0].exp(), atol=0.03, rtol=0)
    same = sum(a.id == b.id for a, b in zip(first, second, strict=True)) / count
    assert abs(same - float((LOGITS.exp() ** 2).sum())) < 0.03  # independent


def test_a_token_without_probability_is_never_chosen_even_by_extreme_draws():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, -1)
    draws = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, draws).tolist() == [1, 3, 3]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5000))
def test_the_largest_draw_chooses_a_token_of_the_vocabulary(seed, size):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 5
    assert int(draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64))) < size


def test_ids_that_only_the_model_knows_are_not_chosen():
    logits = torch.zeros(2, VOCABULARY + 8)
    logits[:, VOCABULARY:] = 50.0
    rows = [Row(Request((VOCABULARY + 3,), 9, Sampling(repetition_penalty=2.0, temperature=t))) for t in (0.0, 1.0)]
    assert all(token.id < VOCABULARY for token in Chooser(VOCABULARY, END).choose(logits, rows))


def test_log_probabilities_are_of_the_models_own_logits_for_the_rows_that_ask():
    logits = random_logits(5, 3)
    likeliest = int(logits[0].argmax())
    away = Sampling(logit_bias=((likeliest, -100.0),))
    asked = [Request((1,), 9, away, alternatives=2), Request((1,), 9), Request((1,), 9, alternatives=0)]
    found = Chooser(VOCABULARY, END).choose(logits, [Row(request) for request in asked])
    expected = logits.log_softmax(dim=-1)
    order = expected[0].argsort(descending=True)[:2].tolist()
    assert found[0].id == order[1] and not found[0].greedy
    assert found[0].log_probability == pytest.approx(float(expected[0, order[1]]))
    assert [token for token, _ in found[0].alternatives] == order
    assert [value for _, value in found[0].alternatives] == pytest.approx(expected[0, order].tolist())
    assert found[1].log_probability is None and found[1].alternatives == ()
    assert found[2].greedy and found[2].alternatives == () and found[2].log_probability is not None


def test_kept_logits_are_the_models_own_for_the_tokenizers_ids():
    logits = random_logits(6, 2)
    rows = [Row(Request((1,), 9, Sampling(temperature=3.0), keep_logits=True)), Row(Request((1,), 9))]
    kept, plain = Chooser(VOCABULARY - 5, 0).choose(logits, rows)
    assert list(kept.logits) == logits[0, : VOCABULARY - 5].tolist()
    assert plain.logits == ()


def test_the_end_and_stop_tokens_wait_for_the_minimum():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, END], logits[0, 7], logits[0, 3] = 9.0, 8.0, 1.0
    request = Request((1,), 9, minimum_tokens=2, stop_tokens=frozenset({7}))
    for asked, expected in ((request, [3, 3, END]), (replace(request, ignore_end=True), [END, END, END])):
        row, chooser = Row(asked), Chooser(VOCABULARY, END)
        assert [grow(chooser, logits, [row])[0].id for _ in range(3)] == expected


def test_a_row_that_has_grown_elsewhere_is_penalized_for_what_it_has_now():
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 4], logits[0, 5], logits[0, 6] = 3.0, 2.0, 1.0
    row, chooser = Row(Request((1,), 9, Sampling(presence_penalty=9.0))), Chooser(VOCABULARY, END)
    assert chooser.choose(logits, [row])[0].id == 4
    row.append(4)
    row.append(5)  # by another chooser
    assert chooser.choose(logits, [row])[0].id == 6


def test_candidates_of_a_beam_search_are_the_likeliest_that_may_be_chosen_and_leave_the_row_as_it_is():
    logits = random_logits(8)
    row = row_of(Request((1, 2), 9, Sampling(repetition_penalty=1.5), minimum_tokens=VOCABULARY), [5])
    [found] = Chooser(VOCABULARY, END).candidates(logits, [row], 3 * VOCABULARY)
    scores = in_transformers(logits.log_softmax(dim=-1), row.request, [5])
    order = [token for token in scores.argsort(descending=True).tolist() if token != END]
    assert [token for token, _ in found] == order
    assert [value for _, value in found] == pytest.approx(scores[order].tolist())
    assert row.ids == [1, 2, 5]


def test_settings_outside_their_ranges_are_listed():
    assert wrong_settings(Sampling(logit_bias=((3, -100.0),), top_k=4, top_p=1.0, min_p=1.0), 4) == []
    wrong = Sampling(
        logit_bias=((4, 1.0),),
        repetition_penalty=0.0,
        presence_penalty=math.nan,
        temperature=-1.0,
        top_k=-1,
        top_p=1.1,
        min_p=-0.1,
    )
    assert len(wrong_settings(wrong, 4)) == 7
    assert wrong_settings(Sampling(logit_bias=((0, math.inf),)), 4) != []
