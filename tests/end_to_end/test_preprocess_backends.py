"""Preprocessing as a command: the same bytes from every backend, from shares, and from every kind of input."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.test_preprocess_tools import command, run
from tests.tokenizer_files import TEXT, bpe_file

BACKENDS = ["gigatoken", "tiktoken", "hf"]


def nasty_corpus(path: Path, large: int) -> None:
    """Lines with everything that text can hold; large: bytes of one document among them."""
    chance = random.Random(0)
    texts = [
        "", "plain", "ends here <|endoftext|> and goes on", "<|endoftext|>", " " * 20_000 + "x", "a\r\nb\r\n\r\nc",
        "中文，没有空格的一段话。" * 50, "🦊👨‍👩‍👧‍👦🏳️‍🌈", "nul \0 nul",
        "\U00016100\U00010d50 Unicode 16", "\u088f\U00010940 Unicode 17",
        "x" * 700_000, "\n" * 5_000, "e\u0301 \u00e9 \ufeff \u00a0\u3000\u200b", "\U0010ffff\U000f0000",
        "don't WE'LL ſ'ſ ٣٤٥ Ⅷ", *TEXT,
    ]  # fmt: skip
    lines = [json.dumps({"text": text}, ensure_ascii=chance.random() < 0.5).encode() for text in texts]
    lines += [
        b'{"text": "lone \\ud800 surrogate"}',
        b'{"text": "invalid \xff\xfe utf-8"}',
        b'{"text": "\\ud83e\\udd8a"}',
    ]
    words = [word for text in (*TEXT[:3], texts[6], texts[9]) for word in text.split(" ")]
    document, size = [], 0
    while size < large:
        document.append(chance.choice(words) + chance.choice([" ", "  ", "\n", " <|endoftext|>"]))
        size += len(document[-1].encode())
    lines += [json.dumps({"text": "".join(document)}, ensure_ascii=False).encode()]
    chance.shuffle(lines)
    path.write_bytes(b"\n".join(lines) + b"\r\n\n")


def flags(folder: Path, source: Path, name: str) -> list[object]:
    tokenizer = ["--tokenizer-type", "HFTokenizer", "--vocab-file", bpe_file(folder), "--append-eod"]
    return ["--input", source, "--output-prefix", folder / name, *tokenizer]


def result(folder: Path, name: str) -> list[bytes]:
    return [(folder / f"{name}_text_document{ending}").read_bytes() for ending in (".bin", ".idx")]


@pytest.mark.parametrize(
    "size", [200_000, pytest.param(50_000_000, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
def test_every_backend_writes_the_same_bytes_for_a_corpus_of_nasty_things(tmp_path: Path, size: int) -> None:
    nasty_corpus(tmp_path / "nasty.jsonl", size)
    for number, backend in enumerate(["auto", *BACKENDS]):
        done = run("preprocess_data.py", *flags(tmp_path, tmp_path / "nasty.jsonl", backend), "--backend", backend,
                   "--workers", 1 + number % 2, timeout=600)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "2 documents in which U+FFFD stands for invalid text" in done.stdout
        assert "1 empty documents left out" in done.stdout
    assert all(result(tmp_path, backend) == result(tmp_path, "hf") for backend in ("auto", *BACKENDS))


def test_shares_are_joined_and_shuffled_and_inspected(tmp_path: Path) -> None:
    nasty_corpus(tmp_path / "nasty.jsonl", 100_000)
    usual = flags(tmp_path, tmp_path / "nasty.jsonl", "whole")
    assert run("preprocess_data.py", *usual).returncode == 0
    for index in range(3):
        share = [*flags(tmp_path, tmp_path / "nasty.jsonl", f"share{index}"), "--shard", f"{index}/3"]
        assert run("preprocess_data.py", *share).returncode == 0
    parts = [tmp_path / f"share{index}_text_document.idx" for index in range(3)]
    assert (
        run("merge_datasets.py", "--input", *parts, "--output-prefix", tmp_path / "all_text_document").returncode == 0
    )
    assert result(tmp_path, "all") == result(tmp_path, "whole")
    mixed = tmp_path / "mixed"
    done = run("merge_datasets.py", "--input", parts[0], parts[2], "--output-prefix", mixed, "--shuffle", 5)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "mixed_manifest.json").read_text())
    assert manifest["shuffle"] == 5 and manifest["merged"][1]["manifest"]["inputs"][0]["from"] > 0
    shown = run("inspect_dataset.py", mixed, *usual[4:8], "--documents", 0, 1)
    assert shown.returncode == 0 and "--- document 1:" in shown.stdout and "nothing is wrong" in shown.stdout
    with (tmp_path / "mixed.bin").open("r+b") as file:
        file.write(b"\xff\xff")
    wrong = run("inspect_dataset.py", mixed, *usual[4:8])
    assert wrong.returncode == 1
    assert "the id 65,535 is not in the vocabulary" in wrong.stderr and "its SHA-256 differs" in wrong.stderr


def test_standard_input_folders_and_tables_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    nasty_corpus(tmp_path / "nasty.jsonl", 10_000)
    texts = [f"{number} {TEXT[number % 3]}" for number in range(700)]
    parquet.write_table(pyarrow.table({"id": list(range(700)), "text": texts}), tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name in ("t.parquet", "t.jsonl"):
        done = run("preprocess_data.py", *flags(tmp_path, tmp_path / name, name), "--workers", 2)
        assert done.returncode == 0, done.stderr
    assert result(tmp_path, "t.parquet") == result(tmp_path, "t.jsonl")
    with (tmp_path / "t.jsonl").open("rb") as file:
        piped = command("preprocess_data.py", *flags(tmp_path, Path("-"), "piped"))
        assert subprocess.run(piped, stdin=file, capture_output=True, timeout=120).returncode == 0
    assert result(tmp_path, "piped") == result(tmp_path, "t.jsonl")
    missing = run("preprocess_data.py", *flags(tmp_path, tmp_path / "t.parquet", "x"), "--jsonl-keys", "body")
    assert missing.returncode == 2 and 'no column "body" (columns: id, text)' in missing.stderr


def test_a_dataset_of_hugging_face_is_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "corpus").mkdir()
    lines = [json.dumps({"text": f"{number} {TEXT[number % 3]}"}) + "\n" for number in range(50)]
    (tmp_path / "corpus" / "train.jsonl").write_text("".join(lines))
    usual = flags(tmp_path, Path("x"), "streamed")[2:]
    done = run("preprocess_data.py", "--input", f"hf:{tmp_path / 'corpus'}", *usual)
    assert done.returncode == 0, done.stderr
    plain = flags(tmp_path, tmp_path / "corpus" / "train.jsonl", "plain")
    assert run("preprocess_data.py", *plain).returncode == 0
    assert result(tmp_path, "streamed") == result(tmp_path, "plain")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    absent = command("preprocess_data.py", "--input", "hf:nobody/nothing", *usual)
    failed = subprocess.run(absent, capture_output=True, text=True, env=environment, timeout=120)
    assert failed.returncode == 1 and "hf:nobody/nothing could not be read" in failed.stderr
    assert "Traceback" not in failed.stderr


if __name__ == "__main__":  # write the corpus, to try a large document by hand
    nasty_corpus(Path(sys.argv[1]), int(sys.argv[2]))
