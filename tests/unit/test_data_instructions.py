"""Instruction data: what is a label and what is not."""

import json
from pathlib import Path

import pytest

from megatron.data.build import Mixture, build_sources
from megatron.data.indexed import IndexedDataset
from megatron.data.instructions import (
    Chat,
    InstructionTotals,
    PromptAndCompletion,
    chat_template,
    write_instructions,
)
from megatron.data.windows import NOT_A_LABEL
from megatron.errors import RunError, UserError
from megatron.tokenizer.build import build_tokenizer

END = 256
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(folder: Path, records: list, form: PromptAndCompletion | Chat, **settings: bool) -> InstructionTotals:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = build_tokenizer("CharLevelTokenizer")
    return write_instructions([str(folder / "a.jsonl")], str(folder / "out"), tokenizer, form, **settings)


def read(folder: Path) -> list[tuple[str, str]]:
    """Each document, and it again with "_" where nothing is learned; the end of a document is "$"."""
    text, labels = (IndexedDataset(str(folder / f"out_{kind}_document")) for kind in ("text", "label"))
    assert text.sizes.tolist() == labels.sizes.tolist() and text.dtype.name == "uint16" and labels.dtype.name == "int32"
    shown = []
    for number in range(len(text)):
        pairs = list(zip(text.get(number).tolist(), labels.get(number).tolist(), strict=True))
        assert all(label in (token, NOT_A_LABEL) for token, label in pairs)
        letters = ["$" if token == END else chr(token) for token, _ in pairs]
        learned = [letter if label >= 0 else "_" for letter, (_, label) in zip(letters, pairs, strict=True)]
        shown.append(("".join(letters), "".join(learned)))
    return shown


def test_of_prompt_and_completion_the_completion_is_learned(tmp_path: Path) -> None:
    records = [{"q": "1+1=", "a": "2"}, {"q": "", "a": "yes"}, {"a": "", "q": "unanswered"}]
    totals = write(tmp_path, records, PromptAndCompletion("q", "a"))
    assert read(tmp_path) == [("1+1=2$", "____2$"), ("yes$", "yes$")]
    assert (totals.documents, totals.tokens, totals.learned, totals.without_answer) == (2, 10, 6, 1)


def test_of_a_chat_the_answers_are_learned_and_what_asks_for_them_is_not(tmp_path: Path) -> None:
    talk = [("system", "be"), ("user", " hi "), ("assistant", "ho"), ("user", "?"), ("assistant", "!"), ("user", "x")]
    messages = [{"role": role, "content": content} for role, content in talk]
    write(
        tmp_path, [{"messages": messages}, {"messages": messages[:3]}], Chat("messages", TEMPLATE, {"bos_token": "^"})
    )
    text, learned = read(tmp_path)[0]
    assert text == "^<system>be;<user>hi;<assistant>ho;<user>?;<assistant>!;<user>x;$"
    assert learned.replace("_", "") == "ho;!;" and learned[text.index("ho;") :].startswith("ho;")
    assert read(tmp_path)[1][1].replace("_", "") == "ho;$"  # the answer ends the document


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"q": "x"}, r'a.jsonl, line 2: no text under the key "a" \(keys: q\)'),
        ("[1]", "line 2: not a JSON object"),
        ("{", "line 2: not a JSON object"),
        ({"q": 3, "a": "x"}, 'no text under the key "q"'),
    ],
)
def test_a_bad_record_is_named_or_counted(tmp_path: Path, record: object, message: str) -> None:
    good, form = {"q": "a", "a": "b"}, PromptAndCompletion("q", "a")
    with pytest.raises(RunError, match=message):
        write(tmp_path, [good, record, good], form)
    assert not list(tmp_path.glob("out*"))
    assert write(tmp_path, [good, record, good], form, skip_bad_lines=True).documents == 2


def test_a_template_that_changes_what_it_wrote_is_refused(tmp_path: Path) -> None:
    forgetful = "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% endif %}{% endfor %}"
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(RunError, match="changes what it wrote for earlier messages"):
        write(tmp_path, [{"m": talk}], Chat("m", forgetful, {}))
    with pytest.raises(RunError, match="line 1: no system, please"):
        write(tmp_path, [{"m": [{"role": "assistant"}]}], Chat("m", "{{ raise_exception('no system, please') }}", {}))
    with pytest.raises(UserError, match="the chat template cannot be used"):
        Chat("m", "{% if %}", {})


def test_the_template_is_found_beside_the_tokenizer(tmp_path: Path) -> None:
    vocabulary = str(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="there is no chat template in"):
        chat_template("m", None, vocabulary)
    config = {"chat_template": TEMPLATE, "bos_token": {"content": "^"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    record = {"m": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert chat_template("m", None, vocabulary)(record) == [("^<user>a;<assistant>", False), ("b;", True), ("", False)]
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert chat_template("m", None, vocabulary)(record) == [("a", False), ("b", True), ("", False)]


def test_a_run_reads_the_two_files(tmp_path: Path) -> None:
    write(tmp_path, [{"q": "ab", "a": "cd"}] * 4, PromptAndCompletion("q", "a"))
    train = Mixture((str(tmp_path / "out"),), labels=(str(tmp_path / "out_label_document"),))
    source = build_sources(
        mixtures={"train": train}, seq_length=6, seed=1, vocab_size=257, pack_impl="unpacked"
    ).samples("train")
    ids, labels = source[0]
    assert ids.tolist() == [*b"abcd", END, 0, 0]
    assert labels.tolist() == [-100, -100, *b"cd", END, -100, -100]
