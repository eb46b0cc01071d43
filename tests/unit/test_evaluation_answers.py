"""Answers against references: sacrebleu's figures, and files that do not fit together."""

import json

import pytest
import sacrebleu

from megatron.config.load import config_from_flat
from megatron.errors import UserError
from megatron.evaluation.answers import Question, measure_answers, read_questions, score_answers, table

MODEL = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 8}
ANSWERS = ["The cat sat on the mat today.", " Berlin \n", "no idea at all"]
REFERENCES = [["The cat sat on a mat today.", "A cat sat on the mat."], ["Berlin"], ["42", "forty-two", "no idea"]]


def read(**keys):
    return read_questions(config_from_flat(MODEL | {name: str(value) for name, value in keys.items()}))


def test_figures_are_those_of_sacrebleu_and_a_match_ignores_the_white_space_around():
    questions = [Question("?", tuple(references)) for references in REFERENCES]
    figures = score_answers(ANSWERS, questions)
    streams = [[references[i] if i < len(references) else None for references in REFERENCES] for i in range(3)]
    assert figures["bleu"] == sacrebleu.corpus_bleu(ANSWERS, streams).score > 0
    assert figures["chrf"] == sacrebleu.corpus_chrf(ANSWERS, streams).score > 0
    assert figures["exact_match"] == 1 / 3
    assert figures["bleu_signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|")
    assert figures["bleu_signature"] in table(figures) and figures["chrf_signature"] in table(figures)


def test_references_come_with_their_prompts_or_one_a_line_for_a_file_of_prompts(tmp_path):
    lines = [{"prompt": "a\u2028b", "reference": "c"}, {"prompt": "d", "references": ["e", "f"]}]
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n\n" for line in lines))
    assert read(eval_references=tmp_path / "both.jsonl") == [
        Question("a\u2028b", ("c",)),
        Question("d", ("e", "f")),
    ]
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "references.txt").write_text("eins\n\n")
    assert read(eval_references=tmp_path / "references.txt", sample_input_file=tmp_path / "prompts.txt") == [
        Question("one", ("eins",)),
        Question("two", ("",)),
    ]


def test_unequal_numbers_and_lines_that_are_no_question_are_named(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "references.txt").write_text("eins\nzwei\ndrei\n")
    with pytest.raises(UserError, match=r"has 3 lines, one reference each, but sample_input_file .* has 2 prompts"):
        read(eval_references=tmp_path / "references.txt", sample_input_file=tmp_path / "prompts.txt")
    right = {"prompt": "a", "reference": "b"}
    wrong = [{"prompt": "a"}, [right], right | {"references": ["b"]}, {"prompt": 1, "reference": "b"}, right | {"x": 1}]
    wrong += [{"prompt": "a", "references": kind} for kind in ([], "b", [1])]
    lines = [json.dumps(right), "{", *map(json.dumps, wrong)]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as raised:
        read(eval_references=tmp_path / "bad.jsonl")
    numbers = [2, 3, 4, 5, 6, 8, 9, 10]
    assert [problem.split(": not")[0] for problem in raised.value.problems] == [
        f"eval_references: {tmp_path}/bad.jsonl, line {number}" for number in numbers
    ]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="holds no line"):
        read(eval_references=tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="gone"):
        read(eval_references=tmp_path / "gone.jsonl")


def test_without_sacrebleu_the_way_to_get_it_is_said(monkeypatch):
    monkeypatch.setattr("megatron.evaluation.answers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        measure_answers(config_from_flat(MODEL | {"eval_references": "a.jsonl"}), None)
