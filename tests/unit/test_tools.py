"""The tools refuse to write onto what they read, and expand the paths that they are given."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.errors import UserError
from tools import merge_datasets, preprocess_data, train_tokenizer


def texts(path: Path) -> Path:
    path.write_text(json.dumps({"text": "some words"}) + "\n")
    return path


@pytest.mark.parametrize("spelling", ["a.jsonl", "./a.jsonl", "link.json"])
def test_a_tokenizer_is_not_written_onto_its_training_text(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    before = texts(tmp_path / "a.jsonl").read_text()
    (tmp_path / "link.json").symlink_to("a.jsonl")
    with pytest.raises(UserError, match=r"--output .* is input 1 .* itself"):
        train_tokenizer.run(train_tokenizer.parse(["--input", "a.jsonl", "--output", spelling]))
    assert (tmp_path / "a.jsonl").read_text() == before


def test_two_runs_do_not_write_one_tokenizer(tmp_path, other_process):
    arguments = ["--input", str(texts(tmp_path / "a.jsonl")), "--output", str(tmp_path / "t.json")]
    with other_process(tmp_path / "t.json.lock"), pytest.raises(UserError, match=r"--output .* another run: process"):
        train_tokenizer.run(train_tokenizer.parse([*arguments, "--vocab-size", "300"]))
    train_tokenizer.run(train_tokenizer.parse([*arguments, "--vocab-size", "300"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "t.json"]


def test_two_runs_do_not_write_one_output_prefix(tmp_path, other_process):
    flags = ["--tokenizer-type", "CharLevelTokenizer", "--output-prefix", str(tmp_path / "x")]
    arguments = ["--input", str(texts(tmp_path / "a.jsonl")), *flags]
    with other_process(tmp_path / "x.lock"), pytest.raises(UserError, match="another run: process"):
        preprocess_data.run(preprocess_data.parse(arguments))
    preprocess_data.run(preprocess_data.parse(arguments))
    merged = ["--input", str(tmp_path / "x_text_document"), "--output-prefix", str(tmp_path / "y")]
    with other_process(tmp_path / "y.lock"), pytest.raises(UserError, match="another run: process"):
        merge_datasets.run(merge_datasets.parse(merged))
    merge_datasets.run(merge_datasets.parse(merged))
    assert not list(tmp_path.glob("*.lock"))


def test_the_tools_expand_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUN", "one")
    texts(tmp_path / "a.jsonl")
    flags = ["--tokenizer-type", "CharLevelTokenizer", "--output-prefix", "~/$RUN"]
    preprocess_data.run(preprocess_data.parse(["--input", "~/a.jsonl", *flags]))
    merge_datasets.run(merge_datasets.parse(["--input", "~/${RUN}_text_document", "--output-prefix", "~/all"]))
    assert (tmp_path / "all.bin").stat().st_size == 2 * len("some words")


@pytest.mark.parametrize("prefix", ["folder/", "folder", ""])
def test_an_output_prefix_that_is_a_folder_is_refused(tmp_path, monkeypatch, capsys, prefix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="2"):
        merge_datasets.parse(["--input", "x", "--output-prefix", prefix])
    assert "is a folder; add the beginning of the file names" in capsys.readouterr().err


@pytest.fixture
def other_process():
    """A context in which another process holds a lock file."""
    code = (
        "import sys, pathlib; from megatron.files import FileLock\n"
        "lock = FileLock(pathlib.Path(sys.argv[1]), 'it'); lock.take(); print('held', flush=True); sys.stdin.read()\n"
        "lock.release()"
    )

    @contextmanager
    def holding(path: Path):
        command = [sys.executable, "-c", code, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            yield
            process.communicate()
        path.unlink(missing_ok=True)

    return holding
