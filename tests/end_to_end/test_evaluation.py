"""evaluate.py on text in files, as users run it."""

import json

from tests.end_to_end.commands import SMALL, run


def test_text_has_the_perplexity_of_the_same_text_preprocessed_and_more_context_lowers_it(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL.replace("train_iters: 20", "train_iters: 30") + "save: run\n")
    texts = ["All happy families are alike; " * 20, "every unhappy family\nis unhappy in its own way. Größe. " * 9]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ("--input", "texts.jsonl", "--tokenizer-type", "CharLevelTokenizer", "--append-eod")
    run(tmp_path, "tools/preprocess_data.py", *flags, "--output-prefix", "own")
    data = ("data_impl=mmap", "data_path=own_text_document", "split=1", "eval_iters=0")
    run(tmp_path, "train.py", "small.yml", *data)
    found = []
    for stride in (32, 4):
        names = "eval_data=[texts.jsonl, own_text_document]"
        said = run(tmp_path, "evaluate.py", "small.yml", names, f"eval_stride={stride}", "log_dir=out").stdout
        [path] = (tmp_path / "out").glob("eval_results_*.json")
        figures = json.loads(path.read_text())["results"]
        path.unlink()
        assert "texts.jsonl: " in said and "own_text_document: " in said
        assert figures["texts.jsonl"] == figures["own_text_document"]
        assert figures["texts.jsonl"]["bytes"] == sum(len(text.encode()) for text in texts)
        found.append(figures["texts.jsonl"]["loss"])
    assert found[1] < found[0]
