"""serve.py as clients see it: OpenAI's own client, wrong requests, clients that leave."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pytest

from megatron.serving.answer_schemas import ChatAnswer, CompletionAnswer, Health, PlainAnswer, ServedModels
from tests.end_to_end.commands import json_lines, run
from tests.end_to_end.serving import CONTEXT, PATIENCE, Server, make_model, serving, wait_for

JSON = {"Content-Type": "application/json"}
LIMITS = ["generation_batch_size=2", "serve_max_waiting=2", "serve_max_choices=4", "serve_max_body=100000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, *LIMITS, "chat_template=chat.jinja", "serve_model_name=small") as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", timeout=PATIENCE, max_retries=0)


def post(server: Server, path: str, **body: object) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=PATIENCE)


def test_the_model_is_listed_and_found_by_its_name(client):
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == ("small", "deepy")
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match='there is no model "large"'):
        client.models.retrieve("large")


DESCRIBED = {
    ("get", "/v1/models"): (ServedModels, None),
    ("get", "/health"): (Health, None),
    ("post", "/v1/completions"): (
        CompletionAnswer, {"prompt": ["The", "fox"], "n": 2, "max_tokens": 3, "logprobs": 2, "echo": True},
    ),
    ("post", "/v1/chat/completions"): (
        ChatAnswer,
        {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2},
    ),
    ("post", "/generate"): (PlainAnswer, {"prompt": "The", "maximum_tokens": 3}),
}  # fmt: skip


@pytest.mark.parametrize(("method", "path"), DESCRIBED)
def test_an_answer_has_the_fields_that_the_description_gives_it_and_no_others(server, method, path):
    model, body = DESCRIBED[method, path]
    description = httpx.get(f"{server.url}/openapi.json", timeout=PATIENCE).json()
    described = description["paths"][path][method]["responses"]["200"]["content"]
    assert described["application/json"]["schema"] == {"$ref": f"#/components/schemas/{model.__name__}"}
    answer = httpx.request(method, server.url + path, json=body, timeout=PATIENCE)
    model.model_validate_json(answer.content, strict=True)


def test_greedy_completions_are_what_generate_writes(folder, client):
    prompts = ["The quick brown", "def encode(self"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    run(folder, "generate.py", "served", "load=trained", "-i", "prompts.txt", "-o", "texts.jsonl", "maximum_tokens=24")
    written = [record["text"] for record in json_lines(folder / "texts.jsonl")]
    found = client.completions.create(model="small", prompt=prompts, max_tokens=24, temperature=0)
    assert [choice.text for choice in found.choices] == written
    assert [choice.index for choice in found.choices] == [0, 1]
    asked = [{"prompt": prompt, "maximum_tokens": 24} for prompt in prompts]
    plain = [httpx.post(f"{client.base_url}../generate", json=body, timeout=PATIENCE) for body in asked]
    assert [answer.json()["text"] for answer in plain] == written


def test_a_completion_has_sixteen_tokens_by_default_and_its_usage(client):
    found = client.completions.create(model="small", prompt="The fox", extra_body={"ignore_eos": True})
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 16)
    assert found.usage.total_tokens == found.usage.prompt_tokens + 16


def test_the_same_seed_gives_the_same_text_and_each_choice_another(client):
    def texts(seed: int) -> list[str]:
        found = client.completions.create(model="small", prompt="The fox", n=3, seed=seed, extra_body={"min_tokens": 8})
        return [choice.text for choice in found.choices]

    assert texts(5) == texts(5)
    assert len({*texts(5), *texts(6)}) == 6


def test_a_stream_is_the_whole_answer_in_pieces(client):
    asked = {"model": "small", "prompt": ["The fox", "again"], "n": 2, "seed": 3, "max_tokens": 20, "logprobs": 2}
    whole = client.completions.create(**asked)
    pieces = ["", "", "", ""]
    offsets: list[list[int]] = [[], [], [], []]
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for event in events[:-1]:
        [choice] = event.choices
        pieces[choice.index] += choice.text
        offsets[choice.index] += choice.logprobs.text_offset
    assert pieces == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert (events[-1].choices, events[-1].usage) == ([], whole.usage)
    assert len(events) > 20


def test_scoring_a_text_gives_the_log_probabilities_that_it_was_generated_with(client):
    ids = [5, 80, 41, 300, 120, 7]
    asked = {"model": "small", "prompt": ids, "echo": True, "logprobs": 3, "extra_body": {"ignore_eos": True}}
    made = client.completions.create(**asked, max_tokens=6, temperature=0).choices[0]
    assert made.logprobs.token_logprobs[0] is None
    assert len(made.logprobs.tokens) == len(ids) + 6
    assert made.text.endswith("".join(made.logprobs.tokens[-6:])) or "\ufffd" in made.text
    for value, likely in zip(made.logprobs.token_logprobs[-6:], made.logprobs.top_logprobs[-6:], strict=True):
        assert value == max(likely.values())
    scored = client.completions.create(**asked, max_tokens=0).choices[0]
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(made.logprobs.token_logprobs[1 : len(ids)], abs=1e-4)
    assert scored.finish_reason == "length"


def test_a_text_ends_before_a_stop_string(client):
    asked = {"model": "small", "prompt": "The fox", "max_tokens": 40, "seed": 1, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**asked).choices[0].text
    stop = text[len(text) // 2 :][:2]
    for stream in (False, True):
        found = client.completions.create(**asked, stop=["never in it", stop], stream=stream)
        choices = [event.choices[0] for event in found] if stream else found.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logit_bias_chooses_the_token(client, server):
    found = client.completions.create(model="small", prompt="The", max_tokens=3, logit_bias={"70": 100}, logprobs=0)
    assert len(set(found.choices[0].logprobs.tokens)) == 1


def test_a_chat_is_answered_and_streamed(client):
    asked = {"model": "small", "seed": 2, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2, "n": 2}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    whole = client.chat.completions.create(messages=messages, **asked)
    assert [choice.message.role for choice in whole.choices] == ["assistant"] * 2
    for choice in whole.choices:
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
        assert all(bytes(entry.bytes).decode() == entry.token for entry in choice.logprobs.content if entry.bytes)
    pieces = ["", ""]
    events = list(client.chat.completions.create(messages=messages, **asked, stream=True))
    assert [event.choices[0].delta.role for event in events[:2]] == ["assistant"] * 2
    for event in events:
        pieces[event.choices[0].index] += event.choices[0].delta.content or ""
    assert pieces == [choice.message.content for choice in whole.choices]


def test_the_chat_template_writes_the_prompt(client, server):
    messages = [{"role": "user", "content": "Hi"}]
    written = "user: Hi<|endoftext|>\nassistant: "
    by_chat = post(server, "/v1/chat/completions", messages=messages, temperature=0, max_tokens=9).json()
    by_text = post(server, "/v1/completions", prompt=written, temperature=0, max_tokens=9).json()
    assert by_chat["choices"][0]["message"]["content"] == by_text["choices"][0]["text"]
    assert by_chat["usage"] | {"prompt_tokens_details": 0} == by_text["usage"] | {"prompt_tokens_details": 0}


SCHEMA = {
    "type": "object",
    "properties": {"found": {"type": "boolean"}, "place": {"enum": ["here", "there"]}},
    "required": ["found", "place"],
    "additionalProperties": False,
}


def test_an_answer_is_held_to_a_schema_to_json_or_to_a_regular_expression(client):
    asked = {
        "model": "small",
        "messages": [{"role": "user", "content": "Where?"}],
        "n": 3,
        "seed": 1,
        "max_tokens": 600,
    }
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    for choice in client.chat.completions.create(**asked, response_format=form).choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    found = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices
    ended = [choice.message.content for choice in found if choice.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    text = client.completions.create(
        model="small", prompt="", extra_body={"guided_regex": "[a-c]{2,4}-[0-9]+x"}, max_tokens=200
    )
    assert re.fullmatch("[a-c]{2,4}-[0-9]+x", text.choices[0].text)


RIGHT = {
    "/v1/completions": {"prompt": "The", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/generate": {"prompt": "The", "maximum_tokens": 1},
}
# path, fields that are right, the same fields wrong, status, what the message names
WRONG = {
    "no prompt": ("/generate", {"prompt": ""}, {"prompt": None}, 422, "prompt"),
    "a prompt of numbers": ("/v1/completions", {"prompt": [1, 2]}, {"prompt": [1.5]}, 422, "prompt"),
    "an id outside the vocabulary": ("/v1/completions", {"prompt": [399]}, {"prompt": [400]}, 400, "400"),
    "no prompts": ("/v1/completions", {"prompt": [[]]}, {"prompt": []}, 400, "empty list"),
    "ids and texts": ("/v1/completions", {"prompt": ["a", "1"]}, {"prompt": ["a", 1]}, 422, "prompt"),
    "too many choices": ("/v1/completions", {"n": 4}, {"n": 5}, 400, "this server allows 4"),
    "too many prompts": ("/v1/completions", {"prompt": ["a"] * 4}, {"prompt": ["a"] * 5}, 400, "allows 4"),
    "no choices": ("/v1/completions", {"n": 1}, {"n": 0}, 422, "n: "),
    "a hot temperature": ("/v1/completions", {"temperature": 2}, {"temperature": 2.1}, 422, "temperature"),
    "a temperature in words": ("/v1/completions", {"temperature": 0}, {"temperature": "0"}, 422, "temperature"),
    "top_p above one": ("/v1/completions", {"top_p": 1}, {"top_p": 1.01}, 422, "top_p"),
    "a negative top_k": ("/v1/completions", {"top_k": -1}, {"top_k": -2}, 422, "top_k"),
    "a penalty": ("/v1/completions", {"presence_penalty": -2}, {"presence_penalty": 3}, 422, "presence_penalty"),
    "no stop string": ("/v1/completions", {"stop": "x"}, {"stop": ""}, 422, "stop"),
    "too many stop strings": ("/v1/completions", {"stop": ["x"] * 16}, {"stop": ["x"] * 17}, 422, "stop"),
    "a bias by name": ("/v1/completions", {"logit_bias": {"5": 1}}, {"logit_bias": {"five": 1}}, 400, "five"),
    "a bias of no token": ("/v1/completions", {"logit_bias": {"5": 1}}, {"logit_bias": {"999": 1}}, 400, "999"),
    "too long": ("/v1/completions", {"max_tokens": 2}, {"max_tokens": CONTEXT}, 400, "together more than"),
    "no token at all": ("/v1/completions", {"max_tokens": 0, "echo": True}, {"max_tokens": 0}, 400, "echo"),
    "a long prompt": ("/generate", {"prompt": "the " * 9}, {"prompt": "1, 2 " * CONTEXT}, 400, "context"),
    "late stop token": ("/v1/completions", {"stop_token_ids": [9]}, {"stop_token_ids": [401]}, 400, "401"),
    "a minimum above the maximum": ("/v1/completions", {"min_tokens": 1}, {"min_tokens": 2}, 400, "min_tokens"),
    "many alternatives": ("/v1/completions", {"logprobs": 20}, {"logprobs": 21}, 422, "logprobs"),
    "another model": ("/v1/completions", {"model": "small"}, {"model": "gpt-4"}, 404, 'no model "gpt-4"'),
    "best_of": ("/v1/completions", {"best_of": 1}, {"best_of": 2}, 400, "best_of is not supported"),
    "a suffix": ("/v1/completions", {"suffix": None}, {"suffix": "end"}, 400, "suffix is not supported"),
    "a slip": ("/v1/completions", {"user": "me"}, {"temprature": 1}, 400, "temperature is meant, perhaps"),
    "a broken expression": ("/generate", {"guided_regex": "[a]"}, {"guided_regex": "[a"}, 400, "expression ([a)"),
    "a schema that nothing fits": (
        "/v1/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": []}}}},
        400,
        "JSON schema",
    ),
    "stream options": ("/v1/completions", {}, {"stream_options": {"include_usage": True}}, 422, "needs stream"),
    "no messages": ("/v1/chat/completions", {}, {"messages": []}, 422, "messages"),
    "an unknown role": (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": ""}]},
        {"messages": [{"role": "tool", "content": ""}]},
        422,
        "messages.0.role",
    ),
    "a picture": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        422,
        "messages.0.content",
    ),
    "what the template rejects": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        400,
        "the last message must not be",
    ),
    "tools": ("/v1/chat/completions", {"tools": []}, {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    "sound": ("/v1/chat/completions", {"modalities": ["text"]}, {"modalities": ["audio"]}, 400, "modalities"),
    "two limits": (
        "/v1/chat/completions", {"max_completion_tokens": 1}, {"max_completion_tokens": 2}, 422, "max_completion_tok",
    ),
    "alternatives of nothing": (
        "/v1/chat/completions", {"logprobs": True, "top_logprobs": 1}, {"top_logprobs": 1}, 422, "logprobs",
    ),
    "a schema that is not there": (
        "/v1/chat/completions",
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_schema"}},
        422,
        "json_schema",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_by_name_and_its_right_twin_is_answered(server, case):
    path, right, wrong, status, named = WRONG[case]
    good = post(server, path, **RIGHT[path] | right)
    assert good.status_code == 200, good.text
    refused = post(server, path, **RIGHT[path] | wrong)
    assert refused.status_code == status, refused.text
    error = refused.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert named in error["message"]


def test_a_body_that_is_no_json_object_is_refused(server):
    for body, kind in ((b"{", "json"), (b"[]", "json"), (b'{"prompt": "x"}', "plain"), (b"", "json")):
        headers = {"Content-Type": f"application/{kind}"}
        answer = httpx.post(f"{server.url}/generate", content=body, headers=headers, timeout=PATIENCE)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_paths_and_methods_that_do_not_exist_have_errors_of_the_same_form(server):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/generate", 405), ("GET", "/docs", 404)):
        answer = httpx.request(method, server.url + path, timeout=PATIENCE)
        assert (answer.status_code, set(answer.json())) == (status, {"error"})


def test_the_client_shows_errors_by_their_kind(client):
    with pytest.raises(openai.UnprocessableEntityError, match="temperature"):
        client.completions.create(model="small", prompt="x", temperature=9)
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.completions.create(model="small", prompt=[5] * CONTEXT)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_a_body_that_is_too_large_is_refused_whether_its_length_is_told_or_not(server):
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    told = httpx.post(f"{server.url}/generate", content=body, headers=JSON, timeout=PATIENCE)
    assert (told.status_code, told.json()["error"]["code"]) == (413, "too_large")
    chunks = (body[start : start + 1000] for start in range(0, len(body), 1000))
    untold = httpx.post(f"{server.url}/generate", content=chunks, headers=JSON, timeout=PATIENCE)
    assert untold.status_code == 413


def test_lone_surrogates_and_odd_text_are_answered(server):
    for prompt in ("\ud800 half", "nul \0 and \r\n", "🦊" * 3, "<|endoftext|>"):
        body = json.dumps({"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2}).encode()
        answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON, timeout=PATIENCE)
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["text"].startswith(prompt.replace("\ud800", "\ufffd"))


def long_request(server: Server) -> httpx.Response:
    return post(server, "/generate", prompt="The", maximum_tokens=200, ignore_eos=True, temperature=1)


def test_requests_beyond_the_queue_are_refused_and_all_others_answered(server):
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda _: long_request(server), range(9)))
    codes = sorted(answer.status_code for answer in answers)
    assert set(codes) == {200, 429} and codes.count(200) >= 4
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.headers["Retry-After"] == "1"
    assert {answer.json()["generated_tokens"] for answer in answers if answer.status_code == 200} == {200}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(server, stream):
    body = {"prompt": "The", "max_tokens": CONTEXT - 8, "ignore_eos": True, "stream": stream, "n": 2}
    before, left = server.figure("deepy_generated_tokens_total"), server.figure("deepy_disconnects_total")
    with httpx.Client(timeout=PATIENCE) as client:
        if stream:
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(PATIENCE, read=0.3))
    wait_for(lambda: server.figure("deepy_disconnects_total") == left + 1, server.process)
    wait_for(lambda: server.figure("deepy_slots_in_use") == 0, server.process)
    assert server.figure("deepy_generated_tokens_total") - before < 2 * (CONTEXT - 8)


def test_the_client_can_close_a_stream(client, server):
    before = server.figure("deepy_generated_tokens_total")
    stream = client.completions.create(
        model="small", prompt="The", max_tokens=CONTEXT - 8, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.figure("deepy_slots_in_use") == 0, server.process)
    assert server.figure("deepy_generated_tokens_total") - before < CONTEXT - 8


def test_metrics_count_requests_tokens_and_times(server):
    def figures() -> dict[str, float]:
        page = httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text
        return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:{.*})?) (\S+)$", page, re.MULTILINE)}

    before = figures()
    answer = post(server, "/generate", prompt="The fox", maximum_tokens=5, ignore_eos=True).json()
    post(server, "/generate", prompt=3)
    wait_for(lambda: figures() != before, server.process)
    change = {name: value - before.get(name, 0) for name, value in figures().items()}
    assert change['deepy_requests_total{endpoint="/generate",status="200"}'] == 1
    assert change['deepy_requests_total{endpoint="/generate",status="422"}'] == 1
    assert change['deepy_errors_total{code="422"}'] == 1
    assert change["deepy_prompt_tokens_total"] == answer["prompt_tokens"]
    assert change["deepy_generated_tokens_total"] == answer["generated_tokens"] == 5
    assert change["deepy_time_to_first_token_seconds_count"] == 1
    assert change["deepy_time_between_tokens_seconds_count"] == 4
    assert figures()["deepy_slots"] == 2


def test_prompts_are_not_logged(server):
    post(server, "/generate", prompt="a secret of the client", maximum_tokens=1)
    log = server.output.read_text()
    assert "POST /generate: 200" in log
    assert "secret" not in log
