"""tools/show_batch.py: the text of a step, the same that training reads, across a change of the batch size."""

import json
from pathlib import Path

import pytest

from megatron.data.build import build_sources
from megatron.data.indexed import IndexedWriter
from tests.end_to_end.commands import finished

CONFIG = """
num_layers: 2
hidden_size: 16
num_attention_heads: 2
seq_length: 8
tokenizer_type: CharLevelTokenizer
train_batch_size: 4
train_iters: 10
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, letter in (("a_text_document", "a"), ("b_text_document", "b")):
        with IndexedWriter(str(tmp_path / name), "u2") as writer:
            for number in range(30):
                writer.add_document(list(f"{letter}{number:02}{letter * 20}".encode()))
    (tmp_path / "run.yml").write_text(CONFIG)
    return tmp_path


def show(folder: Path, *words: str) -> tuple[int, list[str]]:
    done = finished(folder, "tools/show_batch.py", folder / "run.yml", *words)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_a_step_shows_the_samples_that_training_reads(folder: Path) -> None:
    code, [head, *rows] = show(
        folder, f"data_path={folder}/a_text_document", "split=1,0", "--step", "3", "--length", "0"
    )
    assert (code, head) == (0, "step 3: samples 8 to 11")
    source = build_sources(data_path=str(folder / "a"), split="1", seq_length=8, seed=1234, vocab_size=257).samples(
        "train"
    )
    wanted = [bytes(source[n].tolist()).decode() for n in range(8, 12)]
    assert [row.split("\t")[2] for row in rows] == wanted
    assert [int(row.split("\t")[0]) for row in rows] == [8, 9, 10, 11]
    assert all("epoch 0, from token " in row for row in rows)


def test_a_checkpoint_says_where_a_step_begins_after_another_batch_size(folder: Path) -> None:
    progress = folder / "checkpoints" / "global_step2" / "progress.json"
    progress.parent.mkdir(parents=True)
    progress.write_text(json.dumps({"step": 2, "consumed_samples": 32, "consumed_tokens": 256}))
    data = (f"data_path={folder}/a", "split=1,0", f"load={folder}/checkpoints", f"save={folder}/checkpoints")
    assert show(folder, *data, "--step", "4")[1][0] == "step 4: samples 36 to 39, counted from the checkpoint of step 2"
    assert show(folder, *data, "--step", "2")[1][0] == "step 2: samples 4 to 7"


def test_a_blend_names_the_corpus_and_packing_the_documents(folder: Path) -> None:
    corpora = f"train_data_paths=[{folder}/a_text_document, {folder}/b_text_document]"
    code, [_, *rows] = show(folder, corpora, "train_data_weights=[3, 1]", "pack_impl=unpacked", "--step", "1")
    assert code == 0
    found = [row.split("\t")[1:] for row in rows]
    assert [origin.split(",")[0] for origin, _ in found] == ["a", "a", "a", "b"]
    for origin, text in found:
        number = int(origin.rsplit(" ", 1)[1])
        assert text.startswith(f"{origin[0]}{number:02}")


def test_what_is_not_learned_stands_in_brackets_and_what_fills_up_is_left_out(folder: Path) -> None:
    with IndexedWriter(str(folder / "t"), "u2") as texts, IndexedWriter(str(folder / "l"), "i4") as labels:
        for number in range(30):
            texts.add_document(list(f"q{number:02}a".encode()))
            labels.add_document([-100, -100, *f"{number % 10}".encode(), -100] if number % 2 else [-100] * 4)
    corpora = (
        f"train_data_paths=[{folder}/t]",
        f"train_label_data_paths=[{folder}/l]",
        "pack_impl=pack_until_overflow",
    )
    code, [_, *rows] = show(folder, *corpora, "--step", "1")
    assert code == 0 and len(rows) == 4
    for row in rows:
        first = int(row.split("\t")[1].split(" ")[3].replace(",", ""))
        assert first % 2 == 0 and row.split("\t")[2] == f"[q{first:02}aq{(first + 1) // 10}]{(first + 1) % 10}[a]"


def test_what_is_wrong_is_said_with_exit_code_2(folder: Path) -> None:
    code, lines = show(folder, "data_path=nowhere", "--step", "1")
    assert code == 2 and 'there are no data at "nowhere"' in lines[0]
