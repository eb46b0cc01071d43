"""Prompts from text, JSON lines and standard input."""

import gzip
import io
import json
from types import SimpleNamespace

import pytest

from megatron.config.schema.generation_keys import GenerationKeys
from megatron.errors import UserError
from megatron.generation.prompts import MOST_PROBLEMS, read_prompts

ONCE = '{"prompt": "Once"}'


@pytest.fixture
def read(tmp_path):
    """The prompts of a file with this content, which is called prompts.txt or by another name."""

    def from_file(content: str | bytes, name: str = "prompts.txt", **keys):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_prompts(GenerationKeys(sample_input_file=str(path), **keys))

    return from_file


@pytest.fixture
def texts(read):
    return lambda *arguments, **keys: [prompt.text for prompt in read(*arguments, **keys)]


def test_a_file_is_parted_at_prompt_end_stripped_and_freed_of_empty_prompts(texts):
    assert texts("one\n  two words \n\n\nthree") == ["one", "two words", "three"]
    assert texts("a\nb<END>\n c <END>", prompt_end="<END>") == ["a\nb", "c"]


@pytest.mark.parametrize(("text", "message"), [(" \n\n", "holds no prompt"), (b"ab\xff", "not UTF-8: byte 2")])
@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_without_readable_prompts_is_refused(read, text, message, name):
    with pytest.raises(UserError, match=message):
        read(text, name)


def test_a_missing_file_of_prompts_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt.*No such file"):
        read_prompts(GenerationKeys(sample_input_file=str(tmp_path / "gone.txt")))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfgood morning\ngood night\n", ["good morning", "good night"]),
        ("\ufeffgr\u00fcn\r\n\r\nblau".encode("utf-16-le"), ["gr\u00fcn", "blau"]),
        ("\ufeffgr\u00fcn".encode("utf-32-be"), ["gr\u00fcn"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
    ],
)
def test_a_byte_order_mark_and_the_ends_of_lines_of_windows_are_no_part_of_a_prompt(texts, content, prompts):
    assert texts(content) == prompts


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b"good morning", mtime=0), "gzip data"),
        (b"%PDF-1.7 ", "a PDF document"),
        (b"a\0b\0c\0d\0", "UTF-16-LE"),
    ],
)
def test_a_file_of_prompts_that_is_not_text_is_refused_with_its_kind(read, content, kind):
    with pytest.raises(UserError, match=rf"sample_input_file \(.*prompts.txt\) is {kind}"):
        read(content)


@pytest.mark.parametrize(
    ("content", "keys", "prompts"),
    [
        (b"one\r\ntwo\n", {}, ["one", "two"]),
        (b'{"prompt": "one\\n"}\n\n{"prompt": ""}\n', {"sample_input_format": "jsonl"}, ["one\n", ""]),
    ],
)
def test_a_dash_is_standard_input_of_either_format(monkeypatch, content, keys, prompts):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    read = read_prompts(GenerationKeys(sample_input_file="-", **keys))
    assert [prompt.text for prompt in read] == prompts


def test_standard_input_that_is_not_text_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    with pytest.raises(UserError, match=r"standard input \(sample_input_file: -\) is not UTF-8"):
        read_prompts(GenerationKeys(sample_input_file="-"))


def test_the_name_of_a_file_tells_its_format_unless_a_key_does(texts):
    assert texts(ONCE, "prompts.jsonl") == texts(ONCE, "a.txt", sample_input_format="jsonl") == ["Once"]
    assert texts(ONCE, "prompts.jsonl", sample_input_format="text") == [ONCE]


def test_a_line_of_json_has_settings_of_its_own_and_the_others_from_the_configuration(read):
    line = {
        "prompt": "a\u2028b", "temperature": 0.5, "top_k": 3, "stop": "\n", "stop_token_ids": [1, 2], "seed": 7,
        "num_samples": 2, "logit_bias": {"5": -100}, "json_schema": {"type": "object", "required": ["a-b"]},
    }  # fmt: skip
    one, two = read(json.dumps(line, ensure_ascii=False) + "\n" + ONCE, "p.jsonl", maximum_tokens=9, top_k=40)
    assert (one.text, one.seed, two.seed) == ("a\u2028b", 7, None)
    assert (one.settings.maximum_tokens, one.settings.top_k, two.settings.top_k) == (9, 3, 40)
    assert (one.settings.stop, one.settings.stop_token_ids, one.settings.logit_bias) == (("\n",), (1, 2), {5: -100})
    assert json.loads(one.settings.json_schema or "") == line["json_schema"]
    assert two.settings.temperature == 0


def test_with_chat_a_text_is_a_message_of_the_user_and_a_line_may_hold_a_whole_chat(read):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "thinking": ["x"]}]
    assert read("Who?", chat=True)[0].messages == ({"role": "user", "content": "Who?"},)
    lines = read(json.dumps({"messages": chat}) + "\n" + ONCE, "p.jsonl", chat=True)
    assert [list(prompt.messages) for prompt in lines] == [chat, [{"role": "user", "content": "Once"}]]
    assert [prompt.text for prompt in lines] == ["", ""]


def test_half_a_character_in_json_becomes_a_replacement_character(texts):
    assert texts('{"prompt": "a\\ud800"}', "p.jsonl") == ["a\ufffd"]


# a wrong line, what is said of it, and a right line like it
WRONG = [
    ('{"prompt": "Once"', "this is not JSON: Expecting ',' delimiter (column 18)", ONCE),
    ('["Once"]', 'a line is an object, such as {"prompt": "Once"}, not list', ONCE),
    ('{"text": "Once"}', 'unknown key "text". A line has', ONCE),
    ('{"prompt": "a", "temprature": 1.0}', 'Did you mean "temperature"?', '{"prompt": "a", "temperature": 1.0}'),
    ('{"prompt": "a", "chat": true}', "It is the same for all prompts: set it in the", '{"messages": [MESSAGE]}'),
    ('{"temperature": 1.0}', "either a prompt (text) or messages", '{"prompt": "", "temperature": 1.0}'),
    ('{"prompt": "a", "messages": [MESSAGE]}', "either a prompt (text) or messages", '{"messages": [MESSAGE]}'),
    ('{"messages": []}', "either a prompt (text) or messages", '{"messages": [MESSAGE]}'),
    ('{"messages": [{"content": "a"}]}', 'messages[0]: each message needs a "role"', '{"messages": [MESSAGE]}'),
    ('{"prompt": ["a"]}', "prompt (a list of 1) must be text", '{"prompt": "a"}'),
    ('{"prompt": "a", "top_k": "5"}', 'top_k ("5") must be a whole number', '{"prompt": "a", "top_k": 5}'),
    ('{"prompt": "a", "top_p": 1.5}', "top_p (1.5) must be at most 1", '{"prompt": "a", "top_p": 1.0}'),
    ('{"prompt": "a", "min_p": NaN}', "min_p (nan) must be", '{"prompt": "a", "min_p": 0.1}'),
    ('{"prompt": "a", "maximum_tokens": 0}', "maximum_tokens (0) must be greater than 0", '{"prompt": "a"}'),
    ('{"prompt": "a", "seed": -1}', "seed (-1) must be at least 0", '{"prompt": "a", "seed": 0}'),
    ('{"prompt": "a", "stop": ["b", ""]}', 'stop[1] ("") must not be empty', '{"prompt": "a", "stop": ["b"]}'),
    ('{"prompt": "a", "logit_bias": {"the": 1}}', "logit_bias", '{"prompt": "a", "logit_bias": {"7": 1}}'),
    ('{"prompt": "a", "logit_bias": {"7": 101}}', "must be at most 100", '{"prompt": "a", "logit_bias": {"7": 100}}'),
    (
        '{"prompt": "a", "minimum_tokens": 65}',
        "minimum_tokens (65) must be at most maximum_tokens (64)",
        '{"prompt": "a", "minimum_tokens": 65, "maximum_tokens": 65}',
    ),
    (
        '{"prompt": "a", "num_beams": 2, "top_k": 5}',
        "num_beams (2) excludes top_k (5)",
        '{"prompt": "a", "num_beams": 2, "length_penalty": 0.5}',
    ),
    (
        '{"prompt": "a", "regex": "a+", "json_schema": {}}',
        "json_schema and regex exclude each other",
        '{"prompt": "a", "regex": "a+"}',
    ),
]


@pytest.mark.parametrize(("wrong", "message", "right"), WRONG, ids=[wrong for wrong, _, _ in WRONG])
def test_a_wrong_line_is_refused_with_its_number_and_the_reason(read, wrong, message, right):
    message_text = '{"role": "user", "content": "Hi"}'
    assert len(read("\n".join([ONCE, "", right.replace("MESSAGE", message_text)]), "p.jsonl")) == 2
    with pytest.raises(UserError) as raised:
        read("\n".join([ONCE, "", wrong.replace("MESSAGE", message_text)]), "p.jsonl")
    [problem] = raised.value.problems
    assert "p.jsonl:3: " in problem and message in problem


def test_all_wrong_lines_are_named_at_once_up_to_a_limit(read):
    with pytest.raises(UserError) as raised:
        read("\n".join(['{"prompt": "a", "top_k": -1, "seed": -1}', ONCE, "{}"]), "p.jsonl")
    assert [problem.rpartition("p.jsonl")[2].partition(" ")[0] for problem in raised.value.problems] == [
        ":1:",
        ":1:",
        ":3:",
    ]
    with pytest.raises(UserError, match=r"and 5 more$") as raised:
        read("{}\n" * (MOST_PROBLEMS + 5), "p.jsonl")
    assert len(raised.value.problems) == MOST_PROBLEMS + 1
