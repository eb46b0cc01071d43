"""Prompts become requests to the engine, with an identity that says whether a text can be kept."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron.config.schema.generation_keys import AnswerKeys
from megatron.config.schema.run_keys import TokenizerKeys
from megatron.errors import UserError
from megatron.generation.prompts import Prompt
from megatron.generation.requests import Beams, Constraint, Request, Sampling
from megatron.generation.samples import SampleMaker, model_identity
from megatron.tokenizer.build import build_tokenizer

KEYS = AnswerKeys()
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("CharLevelTokenizer")


@pytest.fixture
def maker(tokenizer):
    return SampleMaker(tokenizer, context=16, seed=3, keys=TokenizerKeys())


def prompts(*texts: str, settings: AnswerKeys = KEYS) -> list[Prompt]:
    return [Prompt(f"prompt {number}", settings, text) for number, text in enumerate(texts, 1)]


def request(maker, settings: AnswerKeys) -> Request:
    [sample] = maker.samples(prompts("a", settings=settings))
    return sample.request


def test_every_prompt_longer_than_the_context_is_named_with_both_lengths(maker):
    assert maker.samples(prompts("x" * 16))[0].request.ids == (ord("x"),) * 16
    with pytest.raises(UserError) as raised:
        maker.samples(prompts("short", "x" * 17, "y" * 20))
    assert [problem.split(",")[0] for problem in raised.value.problems] == [
        "prompt 2: 17 tokens",
        "prompt 3: 20 tokens",
    ]
    assert "context is 16" in str(raised.value)


def test_no_prompt_is_the_beginning_of_a_document(maker, tokenizer):
    assert maker.samples(prompts(""))[0].request.ids == (tokenizer.end_of_document,)


def test_a_setting_becomes_that_of_the_request(maker):
    assert request(maker, KEYS) == Request(ids=(97,), maximum_tokens=64, seed="3/0/0")
    keys = AnswerKeys(
        maximum_tokens=5, minimum_tokens=2, temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.2,
        presence_penalty=0.3, frequency_penalty=0.4, logit_bias={"7": 1.0, "3": -2.0}, stop="x", stop_token_ids=(5,),
        ignore_end_of_document=True, logprobs=2, return_logits=True,
    )  # fmt: skip
    assert request(maker, keys) == Request(
        ids=(97,), maximum_tokens=5, minimum_tokens=2, seed="3/0/0", stop_strings=("x",), stop_tokens=frozenset({5}),
        sampling=Sampling(
            repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4, logit_bias=((3, -2.0), (7, 1.0)),
            temperature=0.5, top_k=4, top_p=0.9, min_p=0.1,
        ),
        ignore_end=True, alternatives=2, keep_logits=True,
    )  # fmt: skip
    beams = AnswerKeys(num_beams=3, length_penalty=0.5, early_stopping=True)
    assert request(maker, beams).beams == Beams(3, 0.5, True)


def test_a_constraint_is_an_expression_or_a_schema_or_the_file_of_one(maker, tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object"}')
    found = [AnswerKeys(regex="a+"), AnswerKeys(json_schema="{}"), AnswerKeys(json_schema=f"{tmp_path}/schema.json")]
    assert [request(maker, keys).constraint for keys in found] == [
        Constraint("regex", "a+"),
        Constraint("json_schema", "{}"),
        Constraint("json_schema", '{"type": "object"}'),
    ]
    with pytest.raises(UserError, match=r"prompt 1: json_schema \(gone.json\) cannot be read: No such file"):
        request(maker, AnswerKeys(json_schema="gone.json"))
    with pytest.raises(UserError, match=r"prompt 1: the regular expression \(\(\) cannot be used"):
        request(maker, AnswerKeys(regex="("))


def test_each_text_has_a_random_stream_from_the_run_and_its_numbers_or_from_the_seed_of_its_prompt(maker):
    one, two = prompts("a", "b", settings=AnswerKeys(num_samples=2))
    samples = maker.samples([one, two, replace(two, seed=5), replace(one, seed=5)])
    assert [sample.request.seed for sample in samples] == [
        *("3/0/0", "3/0/1", "3/1/0", "3/1/1"),
        *("5/0", "5/1", "5/0", "5/1"),
    ]
    assert [(sample.prompt, sample.number) for sample in samples[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_ids_that_the_vocabulary_lacks_are_refused(maker, tokenizer):
    assert request(maker, AnswerKeys(stop_token_ids=(tokenizer.vocab_size - 1,))).stop_tokens
    with pytest.raises(UserError) as raised:
        request(maker, AnswerKeys(stop_token_ids=(1, tokenizer.vocab_size), logit_bias={999: 1.0}))
    assert raised.value.problems == (
        "prompt 1: stop_token_ids (257) must be an id below 257, the size of the vocabulary",
        "prompt 1: logit_bias (999) must be an id below 257, the size of the vocabulary",
    )


def test_a_chat_is_written_by_the_template_and_its_answer_ends_as_the_template_ends_it(tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(
        TEMPLATE.replace("<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}")
    )
    maker = SampleMaker(tokenizer, 64, 3, TokenizerKeys(chat_template=str(tmp_path / "own.jinja")))
    chat = Prompt("prompt 1", AnswerKeys(stop=("x",)), messages=({"role": "user", "content": "Hi"},))
    [sample] = maker.samples([chat])
    assert sample.context == "<user>Hi</s><assistant>" == bytes(sample.request.ids).decode()
    assert sample.request.stop_strings == ("x", "</s>")


def test_without_a_template_chats_are_refused_once(maker):
    with pytest.raises(UserError) as raised:
        maker.samples([Prompt(str(n), KEYS, messages=({"role": "user", "content": "Hi"},)) for n in range(3)])
    assert len(raised.value.problems) == 1 and "chat_template" in str(raised.value)


def test_the_identity_of_a_text_is_that_of_its_request_and_model(maker):
    [one, same] = [maker.samples(prompts("a"))[0] for _ in range(2)]
    assert one.identity("model") == same.identity("model")
    others = [
        AnswerKeys(temperature=0.1),
        AnswerKeys(stop="x"),
        AnswerKeys(stop_token_ids=(1, 2)),
        AnswerKeys(regex="a"),
    ]
    samples = [maker.samples(prompts("a", settings=keys))[0] for keys in others]
    different = {sample.identity("model") for sample in [one, *samples, *maker.samples(prompts("b"))]}
    assert len(different | {one.identity("another model")}) == 7


def test_the_identity_of_a_model_is_that_of_its_weights_and_precision(tmp_path):
    def found(precision: str = "fp32", published: object = None):
        plan = SimpleNamespace(engine=SimpleNamespace(precision=precision))
        return SimpleNamespace(plan=plan, checkpoint=tmp_path, published=published, quantization=None)

    manifest = tmp_path / "manifest.json"
    manifest.write_text("1")
    first = model_identity(found())
    assert first == model_identity(found()) != model_identity(found("bf16"))
    folder = model_identity(found(published=object()))
    manifest.write_text("22")
    assert model_identity(found()) != first
    assert model_identity(found(published=object())) != folder
