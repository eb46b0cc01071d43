"""A run that is interrupted ends like one that is not, bit for bit."""

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.reading import read_tensors
from tests.end_to_end.commands import SMALL, json_lines, losses, run

DROPOUT = "hidden_dropout: 0.1\nattention_dropout: 0.1\nlr_decay_style: cosine\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resuming")
    (folder / "small.yml").write_text(SMALL + DROPOUT)
    run(folder, "train.py", "small", "save=whole", "load=whole")
    return folder


def test_twenty_steps_and_twice_ten_give_the_same_losses_and_weights(folder):
    """On a CPU deterministic or not: its operations are."""
    parts = ("save=parts", "load=parts", "exit_interval=10")
    ways = (("deterministic=true", "num_workers=2"), ("deterministic=false", "num_workers=0"))  # ends with some read
    said = [run(folder, "train.py", "small", *parts, *way).stdout for way in ways]
    assert ["deterministic: every operation" in text for text in said] == [True, False]
    assert losses(folder / "parts") == losses(folder / "whole")
    assert sorted(path.name for path in (folder / "parts").glob("global_step*")) == ["global_step10", "global_step20"]
    whole, parts = (read_tensors(folder / name / "global_step20") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and whole
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.long
@pytest.mark.timeout(600)  # six runs of two ranks
def test_verify_resume_proves_it_for_a_configuration_and_sees_what_differs(folder):
    words = ("small", "num_gpus=2", "zero_optimization={stage: 2}", "bf16={enabled: true}", "--steps", 2)
    said = run(folder, "tools/verify_resume.py", *words).stdout
    assert "4 steps equal 2 + restart + 2, bit for bit" in said
    said = run(folder, "tools/verify_resume.py", "small", "no_load_optim=true", "--steps", 2, expect=1).stdout
    assert "step 4: " in said and "exp_avg differs" in said


@pytest.mark.long
def test_going_back_to_an_earlier_step_trains_it_again_and_keeps_the_old_metrics(folder):
    run(folder, "train.py", "small", "save=back", "load=back", "checkpoint_factor=10")
    said = run(folder, "train.py", "small", "save=back", "load=back", "iteration=10", "train_iters=12").stdout
    assert "resuming from back/global_step10: step 10" in said
    assert list(losses(folder / "back")) == list(range(1, 13))
    moved = json_lines(folder / "back" / "logs" / "metrics.1.jsonl")
    assert [line["step"] for line in moved] == list(range(11, 21))


@pytest.mark.long
def test_finetuning_takes_the_weights_and_nothing_else(folder):
    said = run(folder, "train.py", "small", "save=tuned", "load=whole", "finetune=true", "train_iters=3").stdout
    assert "starting at step 0 with the weights of whole/global_step20" in said
    tuned, whole = losses(folder / "tuned"), losses(folder / "whole")
    assert list(tuned) == [1, 2, 3]
    assert tuned[1] < whole[1] - 1.0
    other = ("small", "save=other", "load=whole", "finetune=true", "train_iters=1", "rotary_emb_base=500000")
    told = run(folder, "train.py", *other, expect=2).stderr
    assert "rotary_emb_base is 500000.0 here, and was 10000.0 there" in told and "allow_changes=[model]" in told
    run(folder, "train.py", *other, "allow_changes=[model]")


def test_a_finished_run_has_nothing_left_to_do(folder):
    said = run(folder, "train.py", "small", "save=whole", "load=whole").stdout
    assert "step 20" in said
    assert "| loss" not in said


def test_without_save_and_log_dir_nothing_is_written_and_that_is_said(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL)
    said = run(tmp_path, "train.py", "small", "train_iters=2").stdout
    assert "no files are written" in said
    assert [path.name for path in tmp_path.iterdir()] == ["small.yml"]
