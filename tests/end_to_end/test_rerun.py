"""A run that was changed in the code, killed and resumed is made again elsewhere from its record, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.record.start import read_starts
from tests.end_to_end.commands import ENVIRONMENT, ROOT, SMALL, json_lines, losses
from tests.end_to_end.processes import end, process_of_rank, started, steps_done, wait_for

# What a user may have changed, and not committed: the losses depend on it.
CHANGE = ("megatron/optimizers/schedules.py", "\n\n_learning_rate = learning_rate\n\n\ndef learning_rate(*words):\n"
          "    return 0.5 * _learning_rate(*words)\n")  # fmt: skip


@pytest.fixture
def code(tmp_path) -> Path:
    """The code of this test in a repository of its own, with a commit not pushed and a change not committed."""
    folder = tmp_path / "code"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron", folder / "megatron", ignore=ignored)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    git = ["git", "-C", str(folder), "-c", "user.name=us", "-c", "user.email=us@example.org"]
    remote = str(tmp_path / "remote")
    for words in (
        ["init", "--quiet"],
        ["add", "."],
        ["commit", "--quiet", "-m", "all"],
        ["clone", "--quiet", "--bare", str(folder), remote],
        ["remote", "add", "origin", remote],
        ["commit", "--quiet", "--allow-empty", "-m", "not pushed"],
    ):
        subprocess.run([*git, *words], check=True)
    with (folder / CHANGE[0]).open("a") as file:
        file.write(CHANGE[1])
    return folder


def corpus(folder: Path) -> Path:
    """A tokenized corpus; its prefix."""
    folder.mkdir()
    texts = "".join(f'{{"text": "{number} bottles of {"beer " * (number % 7)}on the wall"}}\n' for number in range(300))
    (folder / "a.jsonl").write_text(texts)
    words = ["--input", "a.jsonl", "--output-prefix", "a", "--tokenizer-type", "CharLevelTokenizer", "--append-eod"]
    subprocess.run([sys.executable, ROOT / "tools" / "preprocess_data.py", *words], cwd=folder, check=True)
    return folder / "a_text_document"


@pytest.mark.long
def test_a_run_is_made_again_elsewhere_with_the_same_losses(tmp_path, code):
    first = tmp_path / "first"
    first.mkdir()
    data = corpus(first / "data")
    settings = SMALL
    for old, new in (("data_impl: mock\n", ""), ("seq_length: 32", "seq_length: 64"), ("iters: 20", "iters: 40")):
        settings = settings.replace(old, new)
    (first / "small.yml").write_text(settings + "data_path: data/a_text_document\nsave: run\nload: run\n")
    train = [sys.executable, str(code / "deepy.py"), "train.py", "small.yml", "num_gpus=2", "checkpoint_factor=5"]
    with started(first, [*train, "train_iters=10000", "lr_decay_iters=40"]) as process:
        wait_for(lambda: steps_done(first / "run") >= 8, process)
        os.kill(process_of_rank(0, process), signal.SIGKILL)
        end(process)
    with started(first, [*train, "seed=1234"]) as process:
        assert end(process)[0] == 0
    starts = read_starts(first / "run" / "logs")
    assert starts[0].step == 0 and starts[1].step % 5 == 0 and starts[1].step > 0
    assert starts[0].facts["code"]["changed_files"] == 1

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(data.parent, elsewhere / "corpora")
    shutil.rmtree(data.parent)
    rerun = [sys.executable, str(ROOT / "tools" / "rerun.py"), str(first / "run"), "--python", sys.executable]
    rerun += ["--into", str(elsewhere)]
    lost = subprocess.run(rerun, capture_output=True, text=True)
    assert lost.returncode == 1 and "NOT HERE" in lost.stderr and "NOT HERE" in lost.stdout
    moved = ["--moved", f"{first / 'data'}={elsewhere / 'corpora'}"]
    script = subprocess.run([*rerun, *moved], capture_output=True, text=True, check=True).stdout
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    again = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, cwd=elsewhere, env=environment | ENVIRONMENT
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert losses(elsewhere / "run") == losses(first / "run")
    assert max(losses(first / "run")) == 40
    rates = {
        row["step"]: row["train/learning_rate"] for row in json_lines(elsewhere / "run" / "logs" / "metrics.jsonl")
    }
    assert rates[1] == 0.5 * 1e-2  # the change was applied
    assert [start.step for start in read_starts(elsewhere / "run" / "logs")] == [start.step for start in starts]
