"""JSON lines out, and files that a later run continues."""

import json
import os
from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.generation.records import SamplesFile, record
from megatron.generation.requests import Answer, Request, Token
from megatron.generation.samples import Sample
from megatron.tokenizer.build import build_tokenizer

IDENTITIES = ["a0", "b1", "c2"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("CharLevelTokenizer")


def answer(text: str, reason: str) -> Answer:
    return Answer([Token(byte) for byte in text.encode()], text, reason=reason, seconds=1.5)


def sample(**request) -> Sample:
    return Sample(4, 1, "hello ", Request((1,), 8, **request))


def test_a_record_has_the_documented_fields(tokenizer):
    assert record(sample(), answer("world", "end"), tokenizer, "a0") == {
        "context": "hello ",
        "text": "world",
        "length": 5,
        "finished": True,
        "message": None,
        "duration_seconds": 1.5,
        "reason": "end",
        "prompt": 4,
        "sample": 1,
        "identity": "a0",
    }


@pytest.mark.parametrize(("reason", "finished"), [("end", True), ("stop", True), ("length", False)])
def test_a_text_that_maximum_tokens_cut_is_not_finished(tokenizer, reason, finished):
    fields = record(sample(), answer("world", reason), tokenizer, "")
    assert (fields["finished"], fields["reason"]) == (finished, reason)


@pytest.mark.parametrize(("reason", "why"), [("end", "end of the document"), ("stop", "began with a stop string")])
def test_where_nothing_was_generated_the_text_is_null_and_a_message_says_why(tokenizer, reason, why):
    fields = record(sample(), answer("", reason), tokenizer, "")
    assert (fields["text"], fields["length"], fields["finished"]) == (None, 0, True)
    assert why in fields["message"]


def test_log_probabilities_and_logits_are_there_if_they_were_asked_for(tokenizer):
    tokens = [Token(ord("a"), -0.5, True, ((ord("a"), -0.5), (ord("b"), -1.5)), (1.0, 2.0))]
    fields = record(sample(alternatives=2, keep_logits=True), Answer(tokens, "a", reason="end"), tokenizer, "")
    alternatives = [{"token": "a", "id": 97, "logprob": -0.5}, {"token": "b", "id": 98, "logprob": -1.5}]
    assert fields["logprobs"] == [alternatives[0] | {"top_logprobs": alternatives}]
    assert json.loads(json.dumps(fields))["logits"] == [[1.0, 2.0]]


def test_an_output_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="sample_output_file"):
        SamplesFile(tmp_path, [])


def write(path: Path, identities: list[str], overwrite: bool = False, most: int = 9) -> int:
    """Do a job of these texts, at most so many of them; how many were there already."""
    with SamplesFile(path, identities, overwrite) as output:
        output.begin()
        for identity in identities[output.kept :][:most]:
            output.write({"context": "grün", "identity": identity})
        return output.kept


def read(path: Path) -> list[str]:
    return [json.loads(line)["identity"] for line in path.read_text().splitlines()]


def test_a_later_run_keeps_what_is_written_and_adds_the_rest(tmp_path):
    path = tmp_path / "made" / "out.txt"
    assert [write(path, IDENTITIES, most=1) for _ in range(4)] == [0, 1, 2, 3]
    assert read(path) == IDENTITIES
    assert write(path, [*IDENTITIES, "d3"]) == 3
    assert read(path) == [*IDENTITIES, "d3"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("torn", ["{", '{"context": "gr', '{"context": "grün", "identity": "c2"}', ""])
@pytest.mark.parametrize("whole", [2, 3])
def test_a_line_that_is_not_whole_is_cut_off(tmp_path, torn, whole):
    path = tmp_path / "out.txt"
    write(path, IDENTITIES[:whole])
    with path.open("a") as file:
        file.write(torn)
    assert write(path, IDENTITIES) == whole
    assert read(path) == IDENTITIES


OTHERS = {
    "another prompt, model or setting in line 2": ["a0", "x9", "c2"],
    "a text more than the 1 of this job in line 2": ["a0"],
    "another prompt, model or setting in line 1": ["x9"],
}


@pytest.mark.parametrize("problem", OTHERS)
def test_the_texts_of_another_job_are_replaced_only_if_a_key_says_so(tmp_path, problem):
    path = tmp_path / "out.txt"
    write(path, IDENTITIES)
    before = path.read_bytes()
    with pytest.raises(UserError) as raised:
        write(path, OTHERS[problem])
    assert problem in str(raised.value) and "overwrite_samples: true" in str(raised.value)
    assert path.read_bytes() == before
    assert write(path, OTHERS[problem], overwrite=True) == 0
    assert read(path) == OTHERS[problem]


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"text": "old"}\n', "[1]\n"])
def test_a_file_of_something_else_is_not_overwritten(tmp_path, content):
    (tmp_path / "out.txt").write_text(content)
    with pytest.raises(UserError, match="has something else than a generated text in line 1"):
        write(tmp_path / "out.txt", IDENTITIES)
    assert (tmp_path / "out.txt").read_text() == content


def test_nothing_changes_before_the_work_begins(tmp_path):
    (tmp_path / "out.txt").write_text('{"cont')
    SamplesFile(tmp_path / "out.txt", IDENTITIES).close()
    SamplesFile(tmp_path / "out.txt", IDENTITIES, overwrite=True).close()
    assert (tmp_path / "out.txt").read_text() == '{"cont'


def test_what_is_no_regular_file_is_written_to_and_not_read(tmp_path):
    assert write(Path(os.devnull), IDENTITIES) == 0
    assert not Path(f"{os.devnull}.lock").exists()
