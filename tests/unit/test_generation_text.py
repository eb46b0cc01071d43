"""Prompts in and JSON lines out."""

import gzip
import io
import json
from types import SimpleNamespace

import pytest

from megatron.config.load import config_from_flat
from megatron.config.schema.run_keys import GenerationKeys
from megatron.errors import UserError
from megatron.generation.decoding import Continuation
from megatron.generation.prompts import encode_prompts, read_prompts, typed_prompts
from megatron.generation.records import JsonLinesFile, record
from megatron.generation.run import Prompt, generate, ignored_at_a_prompt, prompt_source, write_all
from megatron.tokenizer.build import build_tokenizer
from tests.ranks.run import one_rank
from tests.trained import one_rank_model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("CharLevelTokenizer")


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "prompts.txt"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_a_file_is_parted_at_prompt_end_stripped_and_freed_of_empty_prompts(file):
    assert read_prompts(file("one\n  two words \n\n\nthree"), "\n") == ["one", "two words", "three"]
    assert read_prompts(file("a\nb<END>\n c <END>"), "<END>") == ["a\nb", "c"]


@pytest.mark.parametrize(("text", "message"), [(" \n\n", "holds no prompt"), (b"ab\xff", "not UTF-8: byte 2")])
def test_a_file_without_readable_prompts_is_refused(file, text, message):
    with pytest.raises(UserError, match=message):
        read_prompts(file(text), "\n")


def test_a_missing_file_of_prompts_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.txt.*No such file"):
        read_prompts(tmp_path / "gone.txt", "\n")


def test_every_prompt_longer_than_the_context_is_named_with_both_lengths(tokenizer):
    assert encode_prompts(["x" * 16], tokenizer, context=16) == [[ord("x")] * 16]
    with pytest.raises(UserError) as raised:
        encode_prompts(["short", "x" * 17, "y" * 20], tokenizer, context=16)
    assert [problem.split(",")[0] for problem in raised.value.problems] == [
        "prompt 2 has 17 tokens",
        "prompt 3 has 20 tokens",
    ]
    assert "context is 16" in str(raised.value)


def test_no_prompt_is_the_beginning_of_a_document(tokenizer):
    assert encode_prompts([""], tokenizer, context=16) == [[tokenizer.end_of_document]]


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        ({}, "unconditional"),
        ({"sample_input_file": "a.txt"}, "input-file"),
        ({"text_gen_type": "interactive"}, "interactive"),
        ({"text_gen_type": "unconditional", "sample_input_file": "a.txt"}, "unconditional"),
    ],
)
def test_prompts_come_from_where_the_keys_say(keys, source):
    assert prompt_source(GenerationKeys(**keys)) == source


def test_what_has_no_effect_where_prompts_are_typed_in_is_said():
    keys = {"text_gen_type": "interactive", "temperature": 0.5}
    assert ignored_at_a_prompt(GenerationKeys(**keys)) == []
    assert ignored_at_a_prompt(GenerationKeys(**keys, num_samples=4, return_logits=True, sample_output_file="o")) == [
        "num_samples (4) has no effect: text_gen_type is interactive, each prompt gets one text",
        "return_logits (True) has no effect: text_gen_type is interactive, the text alone is shown",
        "sample_output_file (o) has no effect: text_gen_type is interactive, texts are shown, not written",
    ]


@pytest.mark.parametrize(
    ("typed", "prompt_end", "prompts"),
    [
        ("one\n\ntwo\n", "\n", ["one", "two"]),
        ("one\nstop\ntwo\n", "\n", ["one"]),
        ("no newline at the end", "\n", ["no newline at the end"]),
        ("two\nlines ;;\nnext;;\n", ";;", ["two\nlines", "next"]),
        ("", "\n", []),
    ],
)
def test_typed_prompts_end_with_prompt_end_and_with_the_input(typed, prompt_end, prompts):
    with one_rank():
        assert list(typed_prompts(prompt_end, io.StringIO(typed))) == prompts


def test_a_record_has_the_documented_fields(tokenizer):
    found = Continuation(list(b"world"), finished=True)
    assert record("hello ", found, tokenizer, 1.5) == {
        "context": "hello ",
        "text": "world",
        "length": 5,
        "finished": True,
        "message": None,
        "duration_seconds": 1.5,
    }


def test_where_nothing_was_generated_the_text_is_null_and_a_message_says_why(tokenizer):
    fields = record("hello", Continuation([], finished=True), tokenizer, 1.0)
    assert (fields["text"], fields["length"], fields["finished"]) == (None, 0, True)
    assert "end of the document" in fields["message"]


def test_an_output_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="sample_output_file"):
        JsonLinesFile(tmp_path)


def test_all_prompts_are_written_in_order_whatever_the_batch(tmp_path):
    texts = ["a", "be", "see", "d", "e f"]
    written = []
    with one_rank_model() as model:
        prompts = [Prompt(text, list(text.encode()), str(number)) for number, text in enumerate(texts)]
        for size in (2, 8):
            path = tmp_path / f"out{size}.txt"
            keys = GenerationKeys(maximum_tokens=4, top_k=20, generation_batch_size=size, return_logits=True)
            with JsonLinesFile(path) as output:
                write_all(model, prompts, keys, output)
            written.append([json.loads(line) for line in path.read_text().splitlines()])
    assert [fields["context"] for fields in written[0]] == texts
    assert [fields["text"] for fields in written[0]] == [fields["text"] for fields in written[1]]
    assert all(len(fields["logits"]) == fields["length"] for fields in written[0])
    assert list(written[0][0]) == ["context", "text", "length", "finished", "message", "duration_seconds", "logits"]


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfgood morning\ngood night\n", ["good morning", "good night"]),
        ("\ufeffgr\u00fcn\r\n\r\nblau".encode("utf-16-le"), ["gr\u00fcn", "blau"]),
        ("\ufeffgr\u00fcn".encode("utf-32-be"), ["gr\u00fcn"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
    ],
)
def test_a_byte_order_mark_and_the_ends_of_lines_of_windows_are_no_part_of_a_prompt(file, content, prompts):
    assert read_prompts(file(content), "\n") == prompts


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b"good morning", mtime=0), "gzip data"),
        (b"%PDF-1.7 ", "a PDF document"),
        (b"a\0b\0c\0d\0", "UTF-16-LE"),
    ],
)
def test_a_file_of_prompts_that_is_not_text_is_refused_with_its_kind(file, content, kind):
    with pytest.raises(UserError, match=rf"sample_input_file \(.*prompts.txt\) is {kind}"):
        read_prompts(file(content), "\n")


def test_output_does_not_overwrite_prompts_vocabulary_or_checkpoint(tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts, checkpoint = file("one\n"), tmp_path / "run" / "step7"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"w")
    (tmp_path / "link").symlink_to(prompts)
    found = SimpleNamespace(
        checkpoint=checkpoint, plan=SimpleNamespace(model=SimpleNamespace(max_position_embeddings=8))
    )
    monkeypatch.setattr("megatron.generation.run.find_trained_model", lambda config: found)
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
    for output, name in (
        (str(prompts), "sample_input_file"),
        ("./prompts.txt", "sample_input_file"),
        ("link", "sample_input_file"),
        ("run/../run/step7/weights", "weights of the checkpoint"),
    ):
        keys = sizes | {"sample_input_file": str(prompts), "sample_output_file": output}
        with pytest.raises(UserError, match=rf"sample_output_file \({output}\) is {name} "):
            generate(config_from_flat(keys))
    assert prompts.read_text() == "one\n" and (checkpoint / "weights").read_bytes() == b"w"
