"""Bad input: a message of a line or two, and exit code 2 before work begins or 1 in a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron import doors
from tests.end_to_end.commands import ENVIRONMENT, ROOT, SMALL, json_lines, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A configuration, a corpus and a trained model."""
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "small.yml").write_text(SMALL)
    (folder / "text.txt").write_text("All happy families are alike. " * 200)
    run(
        folder, "tools/preprocess_data.py", "--input", "text.txt", "--tokenizer-type", "CharLevelTokenizer",
        "--output-prefix", "good",
    )  # fmt: skip
    run(folder, "train.py", "small", "save=trained", "train_iters=2", "eval_iters=0")
    (folder / "long.txt").write_text("short\n" + "x" * 33 + "\n")
    (folder / "wrong.jsonl").write_text('{"promt": "a"}\n{"prompt": "a", "top_k": -1}\n')
    (folder / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (folder / "empty.txt").write_text("\n\n")
    cut = (folder / "good_text_document.bin").read_bytes()[:-100]
    (folder / "cut_text_document.bin").write_bytes(cut)
    (folder / "cut_text_document.idx").write_bytes((folder / "good_text_document.idx").read_bytes())
    return folder


GOOD = ["data_impl=mmap", "data_path=good_text_document"]
CASES = {
    "an unknown key": ("train.py", ["num_layrs=3"], ['unknown key "num_layrs"', "num_layers"]),
    "a wrong type": ("train.py", ["num_layers=two"], ["num_layers"]),
    "missing data": ("train.py", ["data_impl=mmap", "data_path=nowhere_text_document"], ["nowhere_text_document"]),
    "data cut short": ("train.py", ["data_impl=mmap", "data_path=cut_text_document"], ["cut_text_document"]),
    "a part that is empty": ("train.py", [*GOOD, "split='0, 1, 0'"], ["no train samples"]),
    "a vocabulary larger than the model's": ("train.py", ["padded_vocab_size=128"], ["257", "128"]),
    "an impossible layout": ("train.py", ["model_parallel_size=3"], ["model_parallel_size"]),
    "a load that is not there": ("train.py", ["load=nowhere"], ["nowhere"]),
    "another run's checkpoints": ("train.py", ["save=trained"], ["trained", "global_step2"]),
    "another model's checkpoint": ("train.py", ["load=trained", "rotary_pct=0.5"], ["rotary_pct", "0.5"]),
    "a save that is a file": ("train.py", ["save=text.txt"], ["save", "text.txt"]),
    "no checkpoint to generate from": ("generate.py", ["load=nowhere"], ["nowhere"]),
    "nothing to load": ("generate.py", [], ["load"]),
    "a prompt longer than the context": (
        "generate.py", ["load=trained", "-i", "long.txt"], ["prompt 2: 33 tokens", "32"],
    ),
    "wrong lines of prompts": (
        "generate.py", ["load=trained", "-i", "wrong.jsonl"], ["wrong.jsonl:1: ", '"prompt"', "wrong.jsonl:2: "],
    ),
    "a chat without a template": (
        "generate.py", ["load=trained", "-i", "chat.jsonl"], ["chat template", "chat_template"],
    ),
    "an output with something else": (
        "generate.py", ["load=trained", "-o", "text.txt"], ["text.txt", "something else", "overwrite_samples"],
    ),
    "a file without prompts": ("generate.py", ["load=trained", "-i", "empty.txt"], ["empty.txt"]),
    "a missing file of prompts": ("generate.py", ["load=trained", "-i", "gone.txt"], ["gone.txt"]),
    "an output that cannot be written": ("generate.py", ["load=trained", "-o", "text.txt/out"], ["text.txt/out"]),
    "another model to generate with": ("generate.py", ["load=trained", "gpt_j_residual=true"], ["gpt_j_residual"]),
    "tasks of the harness": ("evaluate.py", ["load=trained", "--eval_tasks", "piqqa"], ["eval_tasks", "piqqa"]),
    "text to evaluate that is not there": ("evaluate.py", ["load=trained", "eval_data=[gone, cut_text_document]"], [
        'no data at "gone"', "cut_text_document.bin has",
    ]),
    "references of other prompts": ("evaluate.py", ["load=trained", "-i", "long.txt", "--references", "text.txt"], [
        "text.txt) has 1 lines", "long.txt) has 2 prompts",
    ]),
    "a stride beyond the window": ("evaluate.py", ["load=trained", "eval_stride=33"], ["eval_stride (33)", "(32)"]),
    "no tokens to evaluate": ("evaluate.py", ["load=trained", *GOOD, "split='1'"], ["no valid tokens"]),
}  # fmt: skip


TARGETS = {
    "train.py": "megatron.training.run:train",
    "generate.py": "megatron.generation.run:generate",
    "evaluate.py": "megatron.evaluation.run:evaluate",
}


SLOW = "tasks of the harness"  # which reads 14,000 task files


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.long] * (case == SLOW)) for case in CASES])
def test_bad_input_is_exit_code_two_and_a_clear_line(folder, case, monkeypatch, capsys):
    """In this process, past the door's `enter`: a process for each case would take minutes."""
    script, words, named = CASES[case]
    before = sorted(folder.rglob("*"))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, "small", *words])
    assert doors.run(str(ROOT / script), TARGETS[script]) == 2
    said = capsys.readouterr().err
    for name in named:
        assert name in said
    assert len(said.strip().splitlines()) <= 3, said
    assert sorted(folder.rglob("*")) == before
    assert not dist.is_initialized()


def test_an_output_file_survives_a_command_that_is_refused(folder):
    (folder / "kept.txt").write_text("kept")
    run(folder, "generate.py", "small", "load=nowhere", "-o", "kept.txt", expect=2)
    assert (folder / "kept.txt").read_text() == "kept"


def test_a_run_that_diverges_ends_with_exit_code_one_and_saves_nothing_broken(folder):
    done = run(folder, "train.py", "small", "save=broken", "optimizer.params.lr=1e30", "warmup=0", expect=1)
    assert "the training has diverged" in done.stderr
    [kept] = folder.rglob("bad_batch_step_*.jsonl")
    rows = json_lines(kept)
    assert [row["sample"] for row in rows] == list(range(rows[0]["sample"], rows[0]["sample"] + 8))
    assert all(row["text"] for row in rows) and kept.name in done.stderr
    assert "Traceback" not in done.stderr
    assert "loss nan" in done.stdout and "skipped 1" in done.stdout
    assert not list((folder / "broken").glob("global_step*"))


@pytest.mark.long  # test_launch_local has the same of a smaller program
def test_through_the_launcher_the_same_codes_and_lines_come_back_once(folder):
    done = run(folder, "deepy.py", "train.py", "small", "load=nowhere", "num_gpus=2", expect=2)
    assert done.stderr.count("nowhere") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_torchrun_works_as_well_as_our_launcher(folder):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py",
         "small.yml", "train_iters=2", "model_parallel_size=2"],
        capture_output=True, text=True, cwd=folder, env=os.environ | ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pipeline 1 x data 1 x tensor 2" in done.stdout
