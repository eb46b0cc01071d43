"""Chat templates give the text that transformers gives, and the same data every day."""
# ruff: noqa: E501 (templates)

import json
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import UserError
from megatron.preprocessing.record_formats import BadRecordError, Chat, chat_template

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% else %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{{ "Environment: ipython\n" }}{% endif %}
{{- "Today Date: " + date_string + "\n\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception("one tool call at a time") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ "}<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages if m.role != 'system' %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ ' [INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' }}
    {%- if message['content'] is string %}{{ message['content'] | trim }}
    {%- else %}{% for part in message['content'] %}{% if part['type'] != 'text' %}{% continue %}{% endif %}{{ part['text'] | trim }}{% endfor %}
    {%- endif %}{{ '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>' }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
SMOL = """{%- set ns = namespace(first=true) %}{% if documents %}{{ documents }}{% endif %}
{%- for m in messages -%}
  {%- set content = m.content if m.content is string else "" -%}
  {%- if m.role == "assistant" -%}
    {%- generation -%}
      {%- set inner = content.lstrip("\n") %}
      {{- "<|im_start|>assistant\n" + inner + "<|im_end|>\n" -}}
    {%- endgeneration -%}{{ inner is defined }}
  {%- else -%}{{ "<|im_start|>" + m.role + "\n" + content + "<|im_end|>\n" }}{% endif -%}
  {%- if loop.index > 40 %}{% break %}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
REASONING = "{% for m in messages %}{{ m.role }}:{% if m.thinking is defined %}({{ m.reasoning_content }}){% endif %}{{ m.content }};{% endfor %}"
JSON = (
    "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m | tojson(true, separators=(',', ':'), sort_keys=true) }}"
    "{% endfor %}{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ add_generation_prompt }}"
)
TALK = [
    {"role": "user", "content": " How are <you>? ü "},
    {"role": "assistant", "content": "\nFine & well 世界"},
    {"role": "user", "content": "Good."},
    {"role": "assistant", "content": "Yes.", "thinking": "hm"},
]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " a "}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
]
TOOLS = [
    TALK[0],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": "ä", "a": 1}}}],
    },
]


@pytest.mark.parametrize("template", [CHATML, LLAMA, MISTRAL, GEMMA, PHI, SMOL, REASONING, JSON])
@pytest.mark.parametrize("talk", [TALK, PARTS, TOOLS])
@pytest.mark.parametrize("ask", [False, True])
def test_templates_write_what_transformers_write(template: str, talk: list[dict[str, Any]], ask: bool) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    today = None if "strftime_now" not in template else date.today()
    form = Chat("m", template, NAMES, today)
    try:
        [expected], _ = render([talk], chat_template=template, add_generation_prompt=ask, **NAMES)
    except Exception:
        with pytest.raises(BadRecordError):
            form.render(talk, ask)
    else:
        assert form.render(talk, ask) == expected


def test_the_text_in_generation_blocks_is_what_is_learned() -> None:
    learned = "".join(text for text, is_learned in Chat("m", PHI, {})({"m": TALK}) if is_learned)
    assert learned == "\nFine & well 世界<|end|>Yes.<|end|>"


def test_a_template_that_writes_today_s_date_is_refused_without_one(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"the data would depend on the day; fix the date with --chat-date"):
        Chat("m", template, {})
    form = Chat("m", template, {}, date(2024, 7, 26))
    assert form.render(TALK[2:3]) == "2024-07-26Good."
    assert pickle.loads(pickle.dumps(form)).render(TALK[2:3]) == "2024-07-26Good."
    assert json.loads(json.dumps(form.settings()))["date"] == "2024-07-26"


def test_a_template_with_a_fallback_date_uses_it() -> None:
    assert "Today Date: 26 Jul 2024\n" in Chat("m", LLAMA, NAMES).render(TALK)
    assert "Today Date: 01 Feb 2025\n" in Chat("m", LLAMA, NAMES, date(2025, 2, 1)).render(TALK)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[]", "does not hold an object"),
        ("tokenizer_config.json", b'{"chat_template": [{"x": 1}, 2]}', "there is no chat template in"),
        ("tokenizer_config.json", "{}ü".encode("latin-1"), "not UTF-8"),
        ("chat_template.jinja", "{{ x }}".encode("utf-16-le"), "UTF-16-LE text without a byte order mark"),
        ("chat_template.jinja", b"{% for %}", "the chat template cannot be used"),
    ],
)
def test_broken_files_of_a_template_are_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        chat_template("m", None, str(tmp_path / "tokenizer.json"))


def test_a_template_file_with_a_byte_order_mark_is_read_without_it(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    assert chat_template("m", tmp_path / "own.jinja", None).render(TALK[2:3]) == "Good."
    with pytest.raises(UserError, match="there is no chat template without a vocabulary file"):
        chat_template("m", None, None)
    with pytest.raises(UserError, match=r"--chat-template .* cannot be read"):
        chat_template("m", tmp_path / "absent.jinja", None)
