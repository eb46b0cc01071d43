"""evaluate.py on text in files, as users run it."""

import json

import pytest
import sacrebleu

from tests.end_to_end.commands import SMALL, json_lines, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus and a model that knows a little of it."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "small.yml").write_text(SMALL.replace("train_iters: 20", "train_iters: 30") + "save: run\n")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    flags = ("--input", "texts.jsonl", "--tokenizer-type", "CharLevelTokenizer", "--append-eod")
    run(folder, "tools/preprocess_data.py", *flags, "--output-prefix", "own")
    data = ("data_impl=mmap", "data_path=own_text_document", "split=1", "eval_iters=0")
    run(folder, "train.py", "small.yml", *data)
    return folder


TEXTS = ["All happy families are alike; " * 20, "every unhappy family\nis unhappy in its own way. Größe. " * 9]


def results(folder, *words):
    """What the run says, and its results file."""
    said = run(folder, "evaluate.py", "small.yml", *words, "log_dir=out").stdout
    [path] = (folder / "out").glob("eval_results_*.json")
    document = json.loads(path.read_text())
    path.unlink()
    return said, document


def test_text_has_the_perplexity_of_the_same_text_preprocessed_and_more_context_lowers_it(folder):
    losses = []
    for stride in (32, 4):
        said, document = results(folder, "eval_data=[texts.jsonl, own_text_document]", f"eval_stride={stride}")
        figures = document["results"]
        assert "texts.jsonl: " in said and "own_text_document: " in said
        assert figures["texts.jsonl"] == figures["own_text_document"]
        assert figures["texts.jsonl"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
        losses.append(figures["texts.jsonl"]["loss"])
    assert losses[1] < losses[0]


def test_answers_are_those_of_generate_and_are_scored_against_the_references(folder):
    prompts = ["All happy", "every", "is un", "families are alike; All", "Gr"]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    run(folder, "generate.py", "small.yml", "-i", "prompts.txt", "-o", "generated.jsonl", "maximum_tokens=20")
    generated = [row["text"] for row in json_lines(folder / "generated.jsonl")]
    references = [generated[0], *("families are alike" for _ in prompts[1:])]
    (folder / "references.txt").write_text("\n".join(" ".join(text.split()) for text in references))
    words = ("-i", "prompts.txt", "--references", "references.txt", "maximum_tokens=20")
    said, document = results(folder, *words)
    figures = document["results"]["answers"]
    assert [each["answer"] for each in document["answers"]] == generated
    expected = sacrebleu.corpus_chrf(generated, [references])
    assert figures["chrf"] == pytest.approx(expected.score)
    assert figures["prompts"] == 5 and figures["bleu_signature"] in said
