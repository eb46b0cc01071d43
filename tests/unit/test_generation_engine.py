"""The decoding engine with a real model on one rank: batches, arrivals, beginnings that are shared, and endings."""

import re
from copy import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.errors import UserError
from megatron.generation import engine as engine_module
from megatron.generation import lane as lane_module
from megatron.generation.beams import BeamSearch
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.requests import Answer, Beams, Constraint, Request, Sampling
from tests.operations import Operations
from tests.ranks.run import one_rank
from tests.trained import trained_model

TEXTS = ("a", "hello wor", "To be, or", "xyz", "hello world", "q", "To be, or")
SAMPLED = Sampling(temperature=1.0, top_k=40)
CONTEXT = 16


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


@pytest.fixture(params=["rotary", "learned", "windows"])
def model(grid, request):
    kinds = ("local", "global") if request.param == "windows" else ("global",) * 2
    embedding = "learned" if request.param == "learned" else "rotary"
    return trained_model(grid, position_embedding=embedding, num_layers=2, attention_kinds=kinds, sliding_window=5)


@pytest.fixture(scope="module")
def small_model(grid):
    return trained_model(grid, num_layers=2, attention_kinds=("global",) * 2)


@pytest.fixture(scope="module")
def models(grid, small_model):
    windows = trained_model(grid, num_layers=2, attention_kinds=("local", "global"), sliding_window=3)
    return {"global": small_model, "windows": windows}


@pytest.fixture(scope="module", autouse=True)
def short_beginnings_are_shared():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_module, "SHORTEST_SHARED", 2)
        yield


def prompt(text: str, tokens: int = 6, **options) -> Request:
    return Request(tuple(text.encode()), tokens, **options)


def engine_of(model, slots: int = 4, chunk: int = 5, capacity: int = CONTEXT) -> Engine:
    return Engine(model, EngineSettings(slots, capacity, chunk))


def alone(model, request: Request) -> Answer:
    """The answer of an engine with one slot that reads the prompt at once."""
    return engine_of(model, 1, CONTEXT).run([request])[0]


def next_tokens(model, ids: list[int], count: int) -> list[int]:
    """Greedy tokens, each from the whole text of at most the context, without a cache."""
    for _ in range(count):
        logits = model.logits(torch.tensor([ids[-CONTEXT:]]))[0, -1, : model.tokenizer.vocab_size]
        ids = [*ids, int(logits.argmax())]
    return ids[-count:]


@pytest.mark.parametrize("tokens", [6, 24])
def test_tokens_are_the_likeliest_after_all_before_them_also_beyond_the_context(model, tokens):
    answers = engine_of(model).run([prompt(text, tokens) for text in TEXTS])
    expected = [next_tokens(model, list(text.encode()), tokens) for text in TEXTS]
    assert [answer.ids for answer in answers] == expected
    assert {answer.reason for answer in answers} == {"length"}


ARRIVALS = given(data=st.data(), slots=st.integers(1, 4), chunk=st.integers(1, 9), replays=st.booleans())


@pytest.mark.parametrize("kind", ["global", "windows"])
@settings(max_examples=6, deadline=None)
@ARRIVALS
def test_a_text_is_the_same_whatever_arrives_beside_it_and_when(models, kind, data, slots, chunk, replays):
    """Also where steps are replayed, as on a GPU: here by computing them again from the same tensors."""
    answers_are_those_of_texts_alone(models[kind], data, slots, chunk, replays)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["global", "windows"])
@settings(max_examples=60, deadline=None)
@ARRIVALS
def test_a_text_is_the_same_in_many_more_of_these_cases(models, kind, data, slots, chunk, replays):
    answers_are_those_of_texts_alone(models[kind], data, slots, chunk, replays)


def answers_are_those_of_texts_alone(model, data, slots, chunk, replays):
    asked = data.draw(
        st.lists(
            st.builds(
                prompt,
                st.sampled_from([*TEXTS, "hello world, he", "hello world, his", "hello wide web"]),
                st.integers(0, 20),
                sampling=st.sampled_from([Sampling(), SAMPLED]),
                seed=st.sampled_from("xyz"),
                score_from=st.sampled_from([None, 1, 5]),
            ),
            min_size=1,
            max_size=6,
        )
    )
    pauses = data.draw(st.lists(st.integers(0, 4), min_size=len(asked), max_size=len(asked)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.engine, "replays", replays)
        engine, answers, numbers = engine_of(model, slots, chunk), {}, []

    def work(steps: int) -> None:
        for _ in range(steps):
            for update in engine.step():
                answers.setdefault(update.request, Answer()).add(update)

    for request, pause in zip(asked, pauses, strict=True):
        numbers.append(engine.submit(request))
        work(pause)
    while not engine.is_idle:
        work(1)
    for request, number in zip(asked, numbers, strict=True):
        expected, found = alone(model, request), answers[number]
        assert (found.ids, found.text, found.reason) == (expected.ids, expected.text, expected.reason)
        scores = [[token.log_probability for token in answer.scored] for answer in (found, expected)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_scores_of_a_prompt_are_its_log_probabilities(model):
    request = prompt("To be, or not", 0, score_from=3, alternatives=2)
    [answer] = engine_of(model).run([request])
    ids = torch.tensor([request.ids])
    whole = model.logits(ids)[0, :, : model.tokenizer.vocab_size].log_softmax(-1)
    expected = [float(whole[place - 1, token]) for place, token in enumerate(request.ids)][3:]
    assert [token.id for token in answer.scored] == list(request.ids[3:])
    assert [token.log_probability for token in answer.scored] == pytest.approx(expected, abs=1e-4)
    for token, row in zip(answer.scored, whole[2:], strict=False):
        assert [id for id, _ in token.alternatives] == row.topk(2).indices.tolist()
        assert token.greedy == (token.id == int(row.argmax()))


def test_a_copied_ring_has_what_the_next_token_sees_or_is_not_copied(models):
    model = models["windows"]
    engine = engine_of(model, slots=2, chunk=2)
    long, short = "hello world, he", "hello wide web"
    answers = engine.run([prompt(long, 1)]) + engine.run([prompt(short, 3)]) + engine.run([prompt(short + "b", 1)])
    assert [answer.cached for answer in answers] == [0, 0, len(short)]
    for text, answer in zip((long, short, short + "b"), answers, strict=True):
        assert answer.ids == next_tokens(model, list(text.encode()), len(answer.ids))


def test_texts_grow_while_a_long_prompt_is_read(small_model):
    engine = engine_of(small_model, slots=2, chunk=2)
    growing = engine.submit(prompt("a", 14))
    engine.step()
    reading = engine.submit(prompt("To be, or not", 1))
    order = [update.request for _ in range(14) for update in engine.step()]
    assert order.index(reading) >= 5 and order[:5] == [growing] * 5


def test_prompts_that_share_a_beginning_read_it_once(small_model):
    engine = engine_of(small_model, slots=3, chunk=CONTEXT)
    shared = "hello world, he"
    texts = [shared, shared[:-2] + "xy", shared[:-1] + "z"]
    answers = engine.run([prompt(text, 1) for text in texts])
    assert [answer.cached for answer in answers] == [0, len(shared) - 2, len(shared) - 1]
    again = engine.run([prompt(shared, 1)])[0]
    assert again.cached == len(shared) - 1  # the last token is read again, for what follows it
    for text, answer in zip([*texts, shared], [*answers, again], strict=True):
        assert answer.ids == next_tokens(small_model, list(text.encode()), 1)


def test_a_waiting_request_takes_the_slot_of_one_that_has_finished(small_model):
    engine = engine_of(small_model, slots=2)
    long, short, waiting = (engine.submit(prompt(text, tokens)) for text, tokens in (("a", 15), ("b", 2), ("c", 2)))
    ended = []
    while not engine.is_idle:
        ended += [update.request for update in engine.step() if update.reason]
    assert ended == [short, waiting, long]


def test_a_cancelled_request_ends_in_the_next_round_wherever_it_is(small_model):
    engine = engine_of(small_model, slots=1)
    running, waiting, other = (engine.submit(prompt(text, 12)) for text in "abc")
    engine.step()
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    updates = engine.step()
    ended = [(update.request, update.reason) for update in updates if update.reason]
    assert sorted(ended) == [(running, "cancelled"), (waiting, "cancelled")]
    engine.cancel(running)  # it has ended
    while not engine.is_idle:
        updates += engine.step()
    tokens = [token.id for update in updates for token in update.tokens if update.request == other]
    assert tokens == alone(small_model, prompt("c", 12)).ids


def test_the_end_of_the_document_ends_a_text_unless_it_is_ignored(small_model):
    token = alone(small_model, prompt("hello", 4)).ids[2]
    tokenizer = copy(small_model.tokenizer)
    tokenizer.end_of_document = token
    model = replace(small_model, tokenizer=tokenizer)
    ended, ignored, stopped = engine_of(model).run(
        [
            prompt("hello", 4),
            prompt("hello", 4, ignore_end=True),
            prompt("hello", 4, ignore_end=True, stop_tokens=frozenset({token})),
        ]
    )
    assert (ended.reason, len(ended.ids)) == ("end", 2) and (stopped.reason, len(stopped.ids)) == ("stop", 2)
    assert (ignored.reason, len(ignored.ids)) == ("length", 4)


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(small_model):
    whole = alone(small_model, prompt("hello", 10, sampling=SAMPLED, seed="1"))
    stop = whole.text[4:6]
    found = alone(small_model, prompt("hello", 10, sampling=SAMPLED, seed="1", stop_strings=(stop,)))
    assert found.reason == "stop" and found.text == whole.text[: whole.text.index(stop)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0)], ids=["greedy", "sampled"])
def test_ids_that_only_the_model_knows_are_not_generated(small_model, sampling):
    tokenizer = copy(small_model.tokenizer)
    tokenizer.vocab_size = 100
    requests = [prompt(text, 12, sampling=sampling, ignore_end=True) for text in ("a", "hello wor", "To be, or")]
    free, bound = (
        {token for answer in engine_of(model).run(requests) for token in answer.ids}
        for model in (small_model, replace(small_model, tokenizer=tokenizer))
    )
    assert max(free) >= 100 > max(bound)


def test_only_the_logits_that_are_needed_are_computed(small_model):
    engine = engine_of(small_model, slots=2, chunk=CONTEXT)
    with Operations() as computed:
        engine.run([prompt("hello wo", 1), prompt("To be, o", 1)])
    assert computed.count["aten::argmax"] == 1


def test_wrong_requests_are_refused_with_the_sizes(small_model):
    engine = engine_of(small_model, capacity=12)
    with pytest.raises(UserError, match=r"has 17 tokens; the model's context is 16 \(max_position_embeddings\)"):
        engine.submit(prompt("x" * 17))
    with pytest.raises(UserError, match=r"9 tokens of a prompt and up to 6 of its answer do not fit.* 12 tokens"):
        engine.submit(prompt("hello wor", 6))
    with pytest.raises(UserError, match="has no tokens"):
        engine.submit(prompt(""))


def test_slots_are_as_many_as_fit_into_free_memory(small_model, monkeypatch):
    plan = small_model.plan.model
    size = 2 * plan.num_layers * (CONTEXT + 1) * plan.num_kv_heads * plan.head_size * 4  # a column more for padding
    monkeypatch.setattr(engine_module, "_free_memory", lambda device: 3.5 * size / engine_module.MEMORY_SHARE)
    assert engine_of(small_model, slots=64).slots == 3
    monkeypatch.setattr(engine_module, "_free_memory", lambda device: size / 2)
    with pytest.raises(UserError, match=r"keys and values of one text of 16 tokens take .* on a rank"):
        engine_of(small_model)


def beam_search(model, request: Request) -> tuple[int, ...]:
    """The answer with all beams computed from the whole text."""
    search = BeamSearch(request.beams, {model.tokenizer.end_of_document}, request.maximum_tokens)
    texts = [list(request.ids)]
    while not search.done:
        logits = model.logits(torch.tensor(texts))[:, -1, : model.tokenizer.vocab_size].log_softmax(-1)
        best = logits.topk(search.width)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        moves = search.advance([list(zip(*pair, strict=True)) for pair in pairs])
        texts = [[*texts[parent], token] for parent, token in moves]
    return search.best().ids


@pytest.mark.parametrize("count", [2, 3])
def test_a_beam_search_is_that_over_whole_texts_whatever_runs_beside_it(model, count):
    asked = [prompt(text, 5, beams=Beams(count)) for text in ("hello", "To be, or", "a")]
    plain = [prompt(text, 7) for text in ("xyz", "q", "hello wor")]
    answers = engine_of(model, slots=4).run([plain[0], asked[0], plain[1], asked[1], plain[2], asked[2]])
    assert [tuple(answer.ids) for answer in answers[1::2]] == [beam_search(model, request) for request in asked]
    assert [answer.ids for answer in answers[::2]] == [next_tokens(model, list(r.ids), 7) for r in plain]


def test_a_cancelled_beam_search_frees_all_its_slots(small_model):
    engine = engine_of(small_model, slots=3)
    number = engine.submit(prompt("hello", 8, beams=Beams(3)))
    for _ in range(3):
        engine.step()
    assert engine.slots_in_use == 3
    engine.cancel(number)
    [update] = engine.step()
    assert update.reason == "cancelled" and engine.slots_in_use == 0 and engine.is_idle


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_that_is_held_to_a_regular_expression_matches_it(small_model, sampling):
    pattern = "[a-c]{3}(x|yz)"
    constraint = Constraint("regex", pattern)
    asked = [prompt(text, 9, sampling=sampling, seed=text, constraint=constraint) for text in ("hello", "q")]
    answers = engine_of(small_model).run([*asked, prompt("xyz", 9)])
    assert all(re.fullmatch(pattern, answer.text) and answer.reason == "end" for answer in answers[:2])
    assert answers[2].ids == next_tokens(small_model, list(b"xyz"), 9)
    [beamed] = engine_of(small_model).run([prompt("hello", 9, beams=Beams(2), constraint=constraint)])
    assert re.fullmatch(pattern, beamed.text)


def test_beams_that_cannot_be_computed_are_refused_all_at_once(small_model):
    with pytest.raises(UserError) as error:
        engine_of(small_model, slots=2).submit(
            prompt("hello", 12, beams=Beams(3), sampling=SAMPLED, stop_strings=("x",))
        )
    assert len(str(error.value).splitlines()) >= 3


@pytest.mark.parametrize(
    ("wanted", "slots", "places"),
    [([3], [3], [0]), ([1, 2], [1, 2], [0, 1]), ([1, 4], [1, 2, 3, 4], [0, 3]), ([1, 5], [1, 5], [0, 1])],
)
def test_few_slots_between_are_computed_for_nothing_and_many_are_left_out(wanted, slots, places):
    assert lane_module.slots_of_step(wanted) == (slots, places)


@pytest.mark.parametrize(("wanted", "count"), [([0], 1), ([1], 2), ([0, 2], 4), ([5], 6)])
def test_replayed_steps_compute_a_power_of_two_of_slots_or_all(wanted, count):
    assert lane_module.slots_of_replayed_step(wanted, slots=6) == (list(range(count)), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"attention_kinds": ("local", "global"), "sliding_window": 5}], ids=str)
def test_steps_as_cuda_graphs_give_the_tokens_of_steps_that_are_launched_one_by_one(options):
    """fp32 weights as large as in the tests above: the likeliest token leads by far more than kernels differ by."""
    requests = [prompt(text, tokens) for text, tokens in zip(TEXTS, (3, 6, 24, 1, 9, 20, 5), strict=True)]
    with one_rank("cuda") as grid:
        model = trained_model(grid, num_layers=2, **({"attention_kinds": ("global",) * 2} | options))
        assert model.engine.replays
        replayed = engine_of(model).run(requests)
        again = engine_of(model).run(requests)
        model.engine.replays = False
        launched = engine_of(model).run(requests)
    assert [answer.ids for answer in replayed] == [answer.ids for answer in launched]
    assert [answer.ids for answer in again] == [answer.ids for answer in launched]
