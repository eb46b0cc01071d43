"""Requests and answers of the server: what a body asks of the engine, and how the engine's news are written."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from megatron.config.schema.generation_keys import GenerationKeys
from megatron.generation.requests import Constraint, Request, Sampling, Token, Update
from megatron.serving import gate
from megatron.serving.answers import PlainWriter
from megatron.serving.conversion import Converter, Limits
from megatron.serving.errors import ApiError
from megatron.serving.gate import Gate
from megatron.serving.metrics import Metrics
from megatron.serving.openai_answers import ChatWriter, CompletionWriter
from megatron.serving.schemas import UNSUPPORTED, ChatBody, CompletionBody, GenerateBody
from megatron.tokenizer.build import build_tokenizer

TOKENIZER = build_tokenizer("CharLevelTokenizer")


def converter(**keys: object) -> Converter:
    return Converter(TOKENIZER, Limits(context=32, tokens=24, choices=4), "no template here", GenerationKeys(**keys))


def completion(**fields: object) -> list[Request]:
    return converter().completion(CompletionBody(**{"prompt": "ab"} | fields))


def test_defaults_are_those_of_openai():
    [request] = completion()
    assert (request.sampling, request.maximum_tokens, request.alternatives) == (Sampling(temperature=1.0), 16, None)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"temperature": 1e-300}, {"top_p": 0}, {"temperature": 0, "top_k": 5, "min_p": 0.1}]
)
def test_temperature_zero_and_top_p_zero_choose_the_likeliest_token(fields):
    [request] = completion(**fields, presence_penalty=1)
    assert request.sampling.is_greedy
    assert request.sampling.presence_penalty == 1


def test_every_setting_reaches_the_engine():
    fields = {"top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": -1.0}
    [request] = completion(
        **fields, frequency_penalty=2, temperature=0.5, logit_bias={"7": -3}, stop=["x", "yz"], stop_token_ids=[9],
        min_tokens=2, ignore_eos=True, guided_regex="a+", logprobs=3, echo=True,
    )  # fmt: skip
    expected = Sampling(**fields, frequency_penalty=2.0, temperature=0.5, logit_bias=((7, -3.0),))
    assert request.sampling == expected
    assert (request.stop_strings, request.stop_tokens, request.minimum_tokens) == (("x", "yz"), {9}, 2)
    assert (request.ignore_end, request.constraint) == (True, Constraint("regex", "a+"))
    assert (request.alternatives, request.score_from) == (3, 1)


def test_choices_have_seeds_of_their_own_that_depend_on_the_seed_alone():
    seeds = [request.seed for request in completion(n=2, prompt=["a", "b"], seed=4)]
    assert len(set(seeds)) == 4
    assert seeds == [request.seed for request in completion(n=2, prompt=["a", "b"], seed=4)]
    assert completion()[0].seed != completion()[0].seed


def test_a_length_by_default_is_cut_to_the_context_and_one_that_is_asked_for_is_refused():
    [request] = completion(prompt="a" * 28)
    assert request.maximum_tokens == 4
    with pytest.raises(ApiError, match=r"28 tokens and max_tokens is 5: .* 32 .* 4 would fit"):
        completion(prompt="a" * 28, max_tokens=5)
    with pytest.raises(ApiError, match="more than the 24 that this server allows"):
        completion(max_tokens=25)
    with pytest.raises(ApiError, match="prompt has 32 tokens"):
        completion(prompt="a" * 32)


def test_plain_generation_has_the_settings_of_the_configuration():
    def sampling(keys: dict[str, object], **fields: object) -> Sampling:
        [request] = converter(**keys).generation(GenerateBody(prompt="a", **fields))
        return request.sampling

    assert sampling({}).is_greedy
    assert sampling({"top_k": 5}) == Sampling(temperature=1.0, top_k=5)  # as in GPT-NeoX
    assert sampling({"temperature": 0.5, "top_p": 0.9}, top_k=3) == Sampling(temperature=0.5, top_p=0.9, top_k=3)
    assert sampling({"temperature": 0.5}, temperature=0).is_greedy
    keys = {"min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": 1.0, "logit_bias": {7: -1.0}}
    expected = Sampling(
        repetition_penalty=1.5, presence_penalty=1.0, logit_bias=((7, -1.0),), temperature=1.0, min_p=0.1
    )
    assert sampling(keys) == expected
    more = {"stop": ("x",), "stop_token_ids": (9,), "minimum_tokens": 99, "ignore_end_of_document": True, "regex": "a"}
    [request] = converter(**more).generation(GenerateBody(prompt="a"))
    assert (request.stop_strings, request.stop_tokens, request.minimum_tokens) == (("x",), {9}, 24)
    assert (request.ignore_end, request.constraint) == (True, Constraint("regex", "a"))
    assert converter(maximum_tokens=9).generation(GenerateBody(prompt="a"))[0].maximum_tokens == 9


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_field_that_would_change_the_answer_is_refused_and_its_neutral_value_is_not(name):
    with pytest.raises(ApiError, match=f"{name} is not supported") as caught:
        completion(**{name: "something"})
    assert (caught.value.status, caught.value.param) == (400, name)
    for neutral in (None, *UNSUPPORTED[name]):
        assert completion(**{name: neutral})


def test_harmless_fields_are_ignored():
    assert completion(user="me", metadata={"a": 1}, store=True, service_tier="auto", parallel_tool_calls=True)


def test_a_model_without_a_template_has_no_chats():
    with pytest.raises(ApiError, match="no template here"):
        converter().chat_completion(ChatBody(messages=[{"role": "user", "content": "x"}]))


def test_log_probabilities_of_completions_keep_the_likeliest_of_tokens_with_one_text():
    [request] = requests = completion(logprobs=3)
    writer = CompletionWriter(TOKENIZER, "m", requests, CompletionBody(prompt="ab", logprobs=3))
    bytes_of_a_character = ((200, -1.0), (201, -2.0), (98, float("-inf")))
    update = Update(1, (Token(200, -1.0, True, bytes_of_a_character), Token(97, -0.5, True, ((97, -0.5),))), "\ufffda")
    writer.add(0, update)
    [choice] = writer.event(0, update)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["\ufffd", "a"],
        "token_logprobs": [-1.0, -0.5],
        "top_logprobs": [{"\ufffd": -1.0, "b": -9999.0}, {"a": -0.5}],
        "text_offset": [0, 1],
    }
    assert request.alternatives == 3


def test_a_chat_tells_no_bytes_of_a_part_of_a_character():
    body = ChatBody(messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=0)
    writer = ChatWriter(TOKENIZER, "m", [Request((97,), 4)], body)
    writer.add(0, Update(1, (Token(200, -1.0), Token(98, -2.0)), "\ufffdb", reason="length"))
    content = writer.whole()["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [("\ufffd", None), ("b", [98])]


def test_the_usage_counts_a_prompt_of_several_choices_once():
    body = CompletionBody(prompt=["abc", "abc"], n=2, stream=True, stream_options={"include_usage": True})
    requests = converter().completion(body)
    writer = CompletionWriter(TOKENIZER, "m", requests, body)
    for place in range(4):
        writer.add(place, Update(place, (Token(97),), "a", reason="end", cached=2))
    last, mark = writer.closing()
    assert (last["choices"], mark) == ([], "[DONE]")
    assert last["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_news_without_anything_to_tell_are_no_event():
    [request] = requests = completion()
    silent = Update(1, (Token(200),), "")
    assert CompletionWriter(TOKENIZER, "m", requests, CompletionBody(prompt="ab")).event(0, silent) is None
    assert (
        ChatWriter(TOKENIZER, "m", requests, ChatBody(messages=[{"role": "user", "content": ""}])).event(0, silent)
        is None
    )
    assert PlainWriter([request]).event(0, silent) is None


async def _echo(scope, receive, send) -> None:
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def through_the_gate(content: object, headers: dict[str, str] | None = None, path: str = "/x") -> httpx.Response:
    async def ask() -> httpx.Response:
        guarded = Gate(_echo, ["/x"], ["secret"], 10, Metrics())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://test") as client:
            return await client.post(path, content=content, headers=headers or {"Authorization": "bearer secret"})

    return asyncio.run(ask())


async def slow_body() -> AsyncIterator[bytes]:
    yield b"12345"
    await asyncio.sleep(60)


async def long_body() -> AsyncIterator[bytes]:
    for _ in range(3):
        yield b"12345"


def test_the_gate_lets_a_body_of_the_largest_size_pass():
    assert through_the_gate(b"1234567890").content == b"1234567890"
    assert through_the_gate(b"12345678901").status_code == 413
    assert through_the_gate(long_body()).status_code == 413


def test_the_gate_does_not_wait_for_a_body_for_ever(monkeypatch):
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.05)
    answer = through_the_gate(slow_body())
    assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == (408, "timeout")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret", "secret"])
def test_the_gate_reads_no_body_without_the_key(header):
    answer = through_the_gate(slow_body(), {"Authorization": header})
    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
