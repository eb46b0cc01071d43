"""The tools that prepare data, as commands."""

import json
import os
import signal
import subprocess
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron.data.indexed import IndexedDataset
from megatron.tokenizer.build import build_tokenizer
from tests.end_to_end import commands
from tests.terminals import terminal
from tests.tokenizer_files import TEXT, gpt2_files


def command(tool: str, *arguments: object) -> list[str]:
    return commands.command(f"tools/{tool}", *arguments)


def run(
    tool: str, *arguments: object, folder: Path = commands.ROOT, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    return commands.finished(folder, f"tools/{tool}", *arguments, timeout=timeout)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": f"title {n}"}) + "\n" for n, text in enumerate(TEXT)))
    return path


def test_a_corpus_is_tokenized_by_the_command_of_the_guides(tmp_path: Path, corpus: Path) -> None:
    vocab, merges = gpt2_files(tmp_path)
    flags = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab", vocab, "--merge-file", merges, "--append-eod"]
    done = run(
        "preprocess_data.py", "--input", corpus, *flags, "--output-prefix", tmp_path / "mine", "--workers", 2,
        "--jsonl-keys", "text", "title", "--log-interval", 50, "--dataset-impl", "mmap", "--num-docs", 60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "mine_text_document.bin: 60 documents" in done.stdout
    tokenizer, dataset = build_tokenizer("GPT2BPETokenizer", vocab, merges), IndexedDataset(str(tmp_path / "mine"))
    for number, text in enumerate(TEXT):
        assert dataset.get(number).tolist() == [*tokenizer.encode(text), tokenizer.end_of_document]
    titles = IndexedDataset(str(tmp_path / "mine_title_document"))
    assert tokenizer.decode(titles.get(7)[:-1]) == "title 7"


def test_without_a_terminal_there_is_a_line_each_interval_and_on_one_there_are_none(
    tmp_path: Path, corpus: Path
) -> None:
    flags = ["--input", corpus, "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", tmp_path / "mine"]
    plain = run("preprocess_data.py", *flags, "--log_interval=20")  # a whole chunk at once: one line
    assert "60 documents, 5,160 tokens" in plain.stdout and "documents/s" in plain.stdout
    with terminal(120) as window:
        both = {"stdout": window.descriptor, "stderr": window.descriptor, "env": os.environ | {"TERM": "xterm"}}
        subprocess.run(command("preprocess_data.py", *flags, "--log_interval=20"), check=True, **both)
        assert any("mine_text_document.bin: 60 documents" in line for line in window.everything)
        assert not any(line.endswith("MB/s") for line in window.everything), "too short for a bar"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--dataset-impl", "lazy"], 2, "Deepy writes mmap only"),
        (["--dataset-impl", "cached"], 2, "Deepy writes mmap only"),
        (["--input", "absent.jsonl"], 2, 'input "absent.jsonl": no such file'),
        (["--tokenizer-type", "HFTokenizer"], 2, "HFTokenizer needs vocab_file"),
        (["--end-of-document-token", "<eod>"], 2, "cannot be chosen"),
        (["--unknown"], 2, "unrecognized arguments: --unknown"),
        (["--jsonl-keys", "body"], 1, 'corpus.jsonl, line 1: no text under the key "body" (keys: text, title)'),
        (["--jsonl-keys", "a/b"], 2, '"a/b" is part of a file name'),
        (["--shard", "2/2"], 2, '"2/2" is not INDEX/COUNT, such as 0/8, with INDEX from 0'),
        (["--min-chars", "999"], 1, "has any text under text (60 documents left out for their length)"),
        (["--output-prefix", "/proc/mine"], 2, "/proc/mine"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    tmp_path: Path, corpus: Path, flags: list[str], code: int, message: str
) -> None:
    usual = ["--input", corpus, "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", tmp_path / "mine"]
    done = run("preprocess_data.py", *usual, *flags)
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_bad_lines_end_the_work_or_are_counted(tmp_path: Path, corpus: Path) -> None:
    corpus.write_text(corpus.read_text() + '{"text": "cut\n' + '{"text": ""}\n')
    flags = ["--input", corpus, "--tokenizer-type", "CharLevelTokenizer", "--output-prefix", tmp_path / "mine"]
    ended = run("preprocess_data.py", *flags)
    assert ended.returncode == 1 and "corpus.jsonl, line 61: not JSON" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]
    counted = run("preprocess_data.py", *flags, "--skip-bad-lines")
    assert counted.returncode == 0
    assert "1 bad lines left out" in counted.stdout and "line 61: not JSON" in counted.stdout
    assert "1 empty documents left out" in counted.stdout


def test_ctrl_c_ends_all_processes_and_leaves_no_output(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 1000}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 60_000)
    flags = ["--input", tmp_path / "large.jsonl", "--output-prefix", tmp_path / "mine", "--workers", 2]
    process = subprocess.Popen(
        command("preprocess_data.py", *flags, "--tokenizer-type", "CharLevelTokenizer"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not (tmp_path / "mine_text_document.bin.partial").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["large.jsonl"]
    assert group_ends(process.pid)


def group_ends(group: int, seconds: float = 10) -> bool:
    """Whether all processes of a group are gone in time; Python's own helper outlives the command by a moment."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_tokenizer_is_trained_from_text_and_can_be_used(tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "new" / "tokenizer.json"
    done = run("train_tokenizer.py", "--input", corpus, "--output", path, "--vocab-size", 300)
    assert done.returncode == 0, done.stderr
    assert f"{path}: byte-level BPE, 300 ids" in done.stdout
    tokenizer = build_tokenizer("HFTokenizer", str(path))
    assert tokenizer.vocab_size == 300 and tokenizer.decode([tokenizer.end_of_document]) == "<|endoftext|>"
    as_in_neox = ["--json_input_dir", tmp_path, "--tokenizer_output_path", tmp_path / "second.json", "-v", 300]
    assert run("train_tokenizer.py", *as_in_neox).returncode == 0
    assert (tmp_path / "second.json").read_bytes() == path.read_bytes()
    small = run("train_tokenizer.py", "--input", corpus, "--output", path, "--vocab-size", 9)
    assert small.returncode == 2 and "at least 257" in small.stderr


@pytest.mark.long
def test_the_standard_library_becomes_a_corpus_once(tmp_path: Path) -> None:
    first = run("prepare_data.py", "stdlib", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "stdlib").iterdir()}
    names = [
        "stdlib.jsonl",
        "stdlib_manifest.json",
        "stdlib_text_document.bin",
        "stdlib_text_document.idx",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in files) == names
    second = run("prepare_data.py", "stdlib", folder=tmp_path)
    assert second.stdout.count(" exists") == 3
    assert files == {path: path.stat().st_mtime_ns for path in files}
    check_standard_library(tmp_path / "data" / "stdlib")


def check_standard_library(folder: Path) -> None:
    """Every document, in its order, ended by the end-of-document token; real text with few ids unused."""
    texts = [json.loads(line)["text"] for line in (folder / "stdlib.jsonl").read_bytes().splitlines()]
    dataset = IndexedDataset(str(folder / "stdlib"))
    tokenizer = build_tokenizer("HFTokenizer", str(folder / "tokenizer.json"))
    assert len(dataset) == len(texts) > 100 and dataset.dtype == np.uint16
    for number in (0, len(texts) // 2, len(texts) - 1):
        *ids, last = dataset.get(number).tolist()
        assert last == tokenizer.end_of_document and tokenizer.decode(ids) == texts[number]
    size = sum(len(text.encode()) for text in texts)
    assert 1_000_000 < size < 30_000_000
    assert 2.5 < size / dataset.num_tokens < 6


@pytest.mark.parametrize("documents", [1, 40])
def test_a_tokenizer_never_sees_what_is_held_out(tmp_path: Path, documents: int) -> None:
    folder = tmp_path / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    texts = [*["to be or not to be "] * 38, *["zqzqzqzq " * 50] * 2]
    texts = texts if documents > 1 else ["to be or not to be " * 1000 + "zqzqzqzq " * 50]
    (folder / "tinyshakespeare.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert run("prepare_data.py", "tinyshakespeare", folder=tmp_path).returncode == 0
    tokenizer = build_tokenizer("HFTokenizer", str(folder / "tokenizer.json"))
    assert len(tokenizer.encode("to be or not")) < 8 and len(tokenizer.encode("zqzqzqzq")) == 8


def test_an_unknown_corpus_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    done = run("prepare_data.py", "enwik9", folder=tmp_path)
    assert done.returncode == 2 and "stdlib" in done.stderr and 'Did you mean "enwik8"' in done.stderr


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("tinyshakespeare", "put a copy at data/tinyshakespeare/input.txt"),
        ("enwik8", "put a copy at data/enwik8/enwik8.zip"),
        ("fineweb-edu", "it needs huggingface.co"),
        ("nobody/nothing", "it needs huggingface.co"),
    ],
)
def test_a_corpus_that_cannot_be_fetched_says_what_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, needed: str
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # no server answers there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    done = run("prepare_data.py", name, folder=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert needed in done.stderr and "without a network, stdlib works" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]


def test_a_corpus_that_was_put_there_by_hand_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "data" / "tinyshakespeare").mkdir(parents=True)
    (tmp_path / "data" / "tinyshakespeare" / "input.txt").write_text("".join(TEXT))
    (tmp_path / "data" / "enwik8").mkdir()
    with zipfile.ZipFile(tmp_path / "data" / "enwik8" / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", "<wiki>\n  <page>\nfirst\n  </page>\n  <page>\nsecond\r\n  </page>\n")
    for name in ("tinyshakespeare", "enwik8"):
        done = run("prepare_data.py", name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    pages = [json.loads(line)["text"] for line in (tmp_path / "data/enwik8/enwik8.jsonl").read_text().splitlines()]
    assert pages == ["<wiki>\n", "  <page>\nfirst\n  </page>\n", "  <page>\nsecond\r\n  </page>\n"]
    assert len(IndexedDataset(str(tmp_path / "data/tinyshakespeare/tinyshakespeare"))) == 1
    again = run("prepare_data.py", "tinyshakespeare", folder=tmp_path)
    assert again.stdout.count(" exists") == 3
    (tmp_path / "data" / "tinyshakespeare" / "tokenizer.json").unlink()
    without = run("prepare_data.py", "tinyshakespeare", folder=tmp_path)
    assert without.stdout.count(" exists") == 1  # the tokens are of the old tokenizer
