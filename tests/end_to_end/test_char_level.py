"""The tutorial everyone starts with: characters of one text file, by the shipped configuration, in fewer steps.

What deepy.py adds to its commands has tests of its own.
"""

import string
from pathlib import Path

import pytest

from tests.end_to_end.commands import ROOT, json_lines, losses, run

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.\n"
FEWER = ("train_iters=90", "eval_interval=45", "eval_iters=2", "log_interval=15", "maximum_tokens=100")
FASTER = ("optimizer.params.lr=5e-3", "num_workers=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    (folder / "input.txt").write_text(TEXT * 200)
    run(
        folder, "tools/preprocess_data.py", "--input", "input.txt", "--tokenizer-type", "CharLevelTokenizer",
        "--output-prefix", "data/char",
    )  # fmt: skip
    return folder


def test_a_character_model_learns_from_one_text_file_and_writes_far_beyond_its_context(folder):
    said = run(folder, "train.py", ROOT / "configs" / "char.yml", *FEWER, *FASTER).stdout
    assert "split by token because it is one document" in said
    assert said.count("validation at step") == 2
    found = losses(folder / "checkpoints" / "char")
    assert found[90] < 2.0 < 2.5 < found[15]
    run(folder, "generate.py", ROOT / "configs" / "char.yml", *FEWER)
    [sample] = json_lines(folder / "samples.txt")
    assert sample["context"] == ""
    assert sample["length"] == 100 or sample["finished"]  # the context has 32
    known = sum(character in TEXT for character in sample["text"])
    assert known > 0.95 * len(sample["text"])
    assert set(sample["text"]) & set(string.ascii_lowercase)
