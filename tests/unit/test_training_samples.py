"""Texts that the model writes in training: which prompts, where they go, and that nothing else changes."""

import json
import logging
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron.checkpoint.state import TrainState
from megatron.config.load import config_from_flat
from megatron.errors import UserError
from megatron.events import EventLog, read_events
from megatron.generation import engine as engine_file
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.samples import SAMPLES_FILE, samples
from tests.harness_tasks import CONTEXT, Weights, training_run, vocabulary

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": CONTEXT, "pos_emb": "rotary"}
PROMPTS = {"sample_prompts": ["a b", ""], "sample_interval": 4, "maximum_tokens": 6, "ignore_end_of_document": True}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A training engine, and the run that hooks see but for its configuration."""
    weights = Weights(MODEL | {"init_method_std": 0.4}, vocabulary(tmp_path_factory.mktemp("vocabulary")), {})
    with training_run(weights) as run:
        yield run


@pytest.fixture
def hook_of(trainer, tmp_path):
    def build(**given):
        config = config_from_flat(MODEL | PROMPTS | {"log_dir": str(tmp_path)} | given)
        return samples(replace(trainer, config=config, events=EventLog(tmp_path)))

    return build


def finished(step: int, **flags: bool) -> FinishedStep:
    return FinishedStep(TrainState(step, 0, 0), SimpleNamespace(), 0.1, flags.pop("is_last", False), **flags)


def written(folder) -> list[dict]:
    path = folder / SAMPLES_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_texts_are_written_at_the_steps_that_are_due_and_at_the_end(hook_of, tmp_path, caplog):
    hook = hook_of(num_samples=2, temperature=1.0)
    with caplog.at_level(logging.INFO):
        for step in (finished(3), finished(4, is_last=True, is_stop=True), finished(8), finished(9, is_last=True)):
            assert not hook.after_step(step)
    rows = written(tmp_path)
    assert [(row["step"], row["number"], row["sample"]) for row in rows] == [
        (step, number, sample) for step in (8, 9) for number in (0, 1) for sample in (0, 1)
    ]
    assert [row["prompt"] for row in rows[::2]] == ["a b", ""] * 2
    assert all((row["tokens"], row["finish"]) == (6, "length") for row in rows)
    texts = [row["text"] for row in rows]
    assert texts[:4] == texts[4:] and texts[0] != texts[1]  # the same weights, other seeds
    events = read_events(tmp_path)
    assert [(event.kind, event.step, event.details) for event in events] == [
        ("samples", 8, {"prompts": 4}),
        ("samples", 9, {"prompts": 4}),
    ]
    assert f'samples at step 8\n  "a b" -> {json.dumps(texts[0], ensure_ascii=False)}' in caplog.text


def test_prompts_of_a_file_have_settings_of_their_own(hook_of, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a b", "maximum_tokens": 2}\n{"prompt": "c"}\n')
    hook_of(sample_prompts=str(file)).after_step(finished(4))
    assert [(row["prompt"], row["tokens"]) for row in written(tmp_path)] == [("a b", 2), ("c", 6)]


def test_random_numbers_go_on_as_without_samples(hook_of):
    def drawn():
        return random.random(), np.random.random(), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    without = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    hook_of(temperature=1.0).after_step(finished(4))
    assert drawn() == without


def test_without_an_interval_there_is_no_hook(hook_of):
    assert hook_of(sample_interval=None, sample_prompts=None) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_prompts": "no/such.txt"}, r"sample_prompts \(no/such.txt\)"),
        ({"sample_prompts": ["a " * 200]}, "sample_prompts, text 1: .*tokens, but the model's context is"),
        ({"num_beams": 2, "maximum_tokens": CONTEXT}, "sample_prompts, text 1: a beam search cannot go beyond"),
        ({"logit_bias": {10_000: 1.0}}, "logit_bias .* must be an id below"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused_when_the_run_starts(hook_of, given, message):
    with pytest.raises(UserError, match=message):
        hook_of(**given)


def test_memory_that_is_used_up_and_a_full_disk_are_warned_of_and_the_run_goes_on(
    hook_of, tmp_path, caplog, monkeypatch
):
    hook = hook_of()
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(engine_file, "_free_memory", lambda _: 0)
        hook.after_step(finished(4))
    assert "no samples at step 4: keys and values of one text" in caplog.text
    (tmp_path / SAMPLES_FILE).mkdir()
    hook.after_step(finished(8))
    hook.after_step(finished(12))
    assert caplog.text.count("samples are in the log only") == 1
    assert [event.step for event in read_events(tmp_path)] == [8, 12]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_interval": None}, "sample_prompts needs sample_interval"),
        ({"sample_prompts": None}, r"sample_interval \(4\) needs sample_prompts"),
        ({"context_parallel_size": 2}, r"sample_interval \(4\) excludes context_parallel_size \(2\)"),
    ],
)
def test_samples_that_cannot_be_made_are_refused(given, message):
    whole = MODEL | PROMPTS | {"data_impl": "mock", "train_batch_size": 2, "train_iters": 1}
    whole |= {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}
    config_from_flat(whole, script="train.py")
    with pytest.raises(UserError, match=message):
        config_from_flat(whole | given, script="train.py")
