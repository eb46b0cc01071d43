"""Texts in training are those of generate.py on the same weights, and leave the training as it is, bit for bit."""

from pathlib import Path

import pytest
import torch

from megatron.checkpoint.reading import read_tensors
from tests.end_to_end.commands import SMALL, json_lines, losses, run

SAMPLES = ("sample_prompts=[Once upon, 'a  b', '']", "sample_interval=2")
# hidden_dropout: so that random numbers matter
STEPS = ("train_iters=4", "eval_iters=0", "hidden_dropout=0.1", "temperature=1.0", "maximum_tokens=12")
LAYOUTS = {
    "one": (),
    "tensor": ("model_parallel_size=2",),
    "pipeline": ("pipe_parallel_size=2",),
    "zero 1": ("zero_optimization={stage: 1}",),
    "zero 3": ("zero_optimization={stage: 3}",),
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.long] if name != "one" else []) for name in LAYOUTS]
)
def test_samples_are_those_of_generation_and_leave_the_training_as_it_is(tmp_path, layout):
    (tmp_path / "small.yml").write_text(SMALL)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once upon"}\n{"prompt": "a  b"}\n{"prompt": ""}\n')
    words, ranks = ("train.py", "small.yml", *STEPS, *LAYOUTS[layout]), 1 if layout == "one" else 2
    said = run(tmp_path, *words, "save=sampled", *SAMPLES, ranks=ranks).stdout
    run(tmp_path, *words, "save=plain", ranks=ranks)
    assert losses(tmp_path / "sampled") == losses(tmp_path / "plain")
    here, there = (read_tensors(tmp_path / save / "global_step4") for save in ("sampled", "plain"))
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    rows = json_lines(tmp_path / "sampled" / "logs" / "samples.jsonl")
    assert [(row["step"], row["number"]) for row in rows] == [(step, text) for step in (2, 4) for text in range(3)]
    assert "samples at step 4" in said
    run(tmp_path, "generate.py", "small.yml", *STEPS[3:], "load=plain", "-i", "prompts.jsonl", "-o", "texts.jsonl")
    assert [row["text"] for row in rows[3:]] == texts(tmp_path / "texts.jsonl")


def texts(path: Path) -> list[str]:
    return [row["text"] for row in json_lines(path)]
