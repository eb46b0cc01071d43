"""Conversations: prompts and commands from standard input, texts as they come."""

import io
import signal

import pytest

from megatron.config.schema.generation_keys import GenerationKeys
from megatron.config.schema.run_keys import TokenizerKeys
from megatron.generation.engine import Engine, EngineSettings
from megatron.generation.interactive import Session
from megatron.generation.samples import SampleMaker
from tests.trained import one_rank_model

TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content }}.{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@pytest.fixture(scope="module")
def model():
    with one_rank_model() as model:
        yield model


@pytest.fixture
def converse(model, monkeypatch, capsys, tmp_path):
    """What is said, line by line, where this is typed, and the prompts that reach the engine."""
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    asked: list[str] = []
    submit = Engine.submit

    def noted(engine, request):
        asked.append(bytes(request.ids).decode())
        return submit(engine, request)

    monkeypatch.setattr(Engine, "submit", noted)

    def run(typed: str, template: bool = True, **keys) -> tuple[list[str], list[str]]:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        tokenizer = TokenizerKeys(chat_template=str(tmp_path / "own.jinja")) if template else TokenizerKeys()
        maker = SampleMaker(model.tokenizer, model.context, seed=1, keys=tokenizer)
        engine = Engine(model, EngineSettings(1, model.context))
        Session(engine, maker, GenerationKeys(**{"maximum_tokens": 3} | keys)).run()
        assert engine.is_idle
        return capsys.readouterr().out.split("\n")[1:], asked

    return run


@pytest.mark.parametrize(
    ("typed", "prompt_end", "prompts"),
    [
        ("one\n\ntwo\n", "\n", ["one", "two"]),
        ("one\nstop\ntwo\n", "\n", ["one"]),
        ("no newline", "\n", ["no newline"]),
        ("two\nlines ;;\nnext;;\n", ";;", ["two\nlines", "next"]),
        ("two\nlines\n\nrest", "\n\n", ["two\nlines", "rest"]),
        ("/usr/bin\n/help\n", "\n", ["/usr/bin"]),
        ("", "\n", []),
    ],
)
def test_typed_prompts_end_with_prompt_end_and_with_the_input(converse, typed, prompt_end, prompts):
    assert converse(typed, prompt_end=prompt_end)[1] == prompts


def test_each_prompt_gets_a_text_and_one_that_cannot_be_continued_a_reason(converse):
    said, asked = converse("one\n" + "x" * 17 + "\none\n", temperature=1.0, maximum_tokens=20)
    assert asked == ["one", "one"]
    first, reason, second = (line.removeprefix(">>> ") for line in said[:3])
    assert reason.startswith("17 tokens, but the model's context is 16")
    assert first and second and first != second


def test_a_chat_holds_what_was_said_until_it_is_cleared(converse):
    _, asked = converse("A\nB\n/clear\n/system S\nC\n", chat=True, maximum_tokens=1)
    assert (asked[0], asked[2]) == ("uA.a", "sS.uC.a")
    assert asked[1].startswith("uA.a") and asked[1].endswith(".uB.a") and len(asked[1]) > len("uA.a.uB.a")


def test_a_command_begins_and_ends_a_chat(converse):
    said, asked = converse("A\n/chat\nB\n/chat\nC\n/system S\n/clear\n")
    assert asked == ["A", "uB.a", "C"]
    assert [line.removeprefix(">>> ") for line in said if "chat:" in line] == [
        "(chat: on, 0 messages, system message: none)",
        "(chat: off, 0 messages, system message: none)",
        *["(chat: off, 0 messages, system message: S)"] * 2,
    ]


def test_the_oldest_messages_are_left_out_where_there_is_no_room_for_an_answer(converse):
    said, asked = converse("".join(f"m{n}\n" for n in range(6)), chat=True)
    assert len(asked) == 6
    assert all(len(prompt) + 3 <= 16 and prompt.startswith("um") for prompt in asked)
    assert any("oldest messages" in line for line in said)


def test_without_a_template_a_chat_is_refused_and_the_conversation_goes_on(converse):
    said, asked = converse("/chat\nA\n", template=False)
    assert "there is no chat template" in said[0]
    assert asked == ["A"]


def test_an_interrupt_ends_the_text_and_a_second_one_the_conversation(converse, monkeypatch):
    steps = {"taken": 0}
    step = Engine.step

    def interrupted(engine):
        steps["taken"] += 1
        if steps["taken"] in (3, 8, 9):
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    said, asked = converse("one\ntwo\nthree\n", maximum_tokens=1000, ignore_end_of_document=True)
    assert asked == ["one", "two"]
    assert steps["taken"] < 15 and all(len(line) < 20 for line in said)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
