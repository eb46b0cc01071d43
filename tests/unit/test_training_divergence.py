"""What a run that has diverged leaves: the batch of the last bad step, by number and text."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from megatron.checkpoint.state import TrainState
from megatron.data.build import build_sources
from megatron.engine.training import StepOutput
from megatron.errors import RunError
from megatron.events import EventLog, read_events
from megatron.tokenizer.build import build_tokenizer
from megatron.training.hooks.base import FinishedStep
from megatron.training.hooks.divergence import PATIENCE, Divergence, divergence, keep_batch, keep_suspect_batch

BATCH, SEQUENCE = 4, 8


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Of a run what is looked at, on its first rank."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    tokenizer = build_tokenizer("CharLevelTokenizer", None, None, None)
    sources = build_sources(data_impl="mock", seq_length=SEQUENCE, seed=1, vocab_size=tokenizer.vocab_size)
    plan = SimpleNamespace(batch=SimpleNamespace(global_size=BATCH), engine=SimpleNamespace(loss_scale=None))
    return SimpleNamespace(
        plan=plan,
        sources=sources,
        tokenizer=tokenizer,
        config=SimpleNamespace(log_folder=str(tmp_path)),
        events=EventLog(tmp_path),
    )


def texts(run, numbers) -> list[dict]:
    samples = run.sources.samples("train")
    return [{"sample": number, "text": run.tokenizer.decode(samples[number].tolist())} for number in numbers]


def test_the_batch_of_the_last_bad_step_is_told_and_written_out(run, tmp_path):
    hook, state = divergence(run), TrainState(step=100, consumed_samples=100 * BATCH)
    with pytest.raises(RunError) as error:
        for bad in range(PATIENCE + 1):
            state = state.after_step(BATCH, BATCH * SEQUENCE)
            output = StepOutput(torch.tensor(math.nan), torch.tensor(math.nan if bad < PATIENCE else 1.0))
            hook.after_step(FinishedStep(state, output, 1e-3, is_last=False))
    path = tmp_path / "bad_batch_step_110.jsonl"
    assert f"was samples 436 to 439; their text is in {path}" in str(error.value)
    assert [json.loads(line) for line in path.read_text().splitlines()] == texts(run, range(436, 440))


def test_the_first_of_some_bad_steps_in_a_row_is_an_event(run, tmp_path):
    hook, norms = divergence(run), [1.0, math.nan, math.inf, 1.0, math.nan]
    for step, norm in enumerate(norms, 1):
        output = StepOutput(torch.tensor(1.0), torch.tensor(norm))
        hook.after_step(FinishedStep(TrainState(step), output, 1e-3, is_last=step == len(norms)))
    assert [(event.kind, event.step) for event in read_events(tmp_path)] == [("not_finite", 2), ("not_finite", 5)]


def test_a_loss_scale_that_is_still_too_high_is_no_event(tmp_path):
    hook = Divergence(PATIENCE, lowest_scale=1.0, events=EventLog(tmp_path))
    for step, scale in enumerate((8.0, 4.0, 2.0, 1.0), 1):
        output = StepOutput(torch.tensor(1.0), torch.tensor(math.inf), loss_scale=scale)
        hook.after_step(FinishedStep(TrainState(step), output, 1e-3, is_last=step == 4))
    assert [event.step for event in read_events(tmp_path)] == [4]


def test_without_a_folder_for_logs_the_samples_are_told(run):
    run.config.log_folder = None
    assert keep_batch(run, TrainState(1, BATCH)).endswith("was samples 0 to 3")


def test_the_batch_of_a_step_that_failed_before_is_written_before_it_is_trained_on(run, tmp_path):
    resumed = TrainState(step=5, consumed_samples=100)  # other batches than now were trained on before
    for done in (None, 5, 3):
        keep_suspect_batch(run, resumed, done)
    assert list(tmp_path.iterdir()) == []
    keep_suspect_batch(run, resumed, 7)
    lines = (tmp_path / "bad_batch_step_7.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == texts(run, range(104, 108))


def test_of_samples_with_labels_the_tokens_are_written(run, tmp_path):
    tokens = run.sources.samples("train")
    run.sources = SimpleNamespace(samples=lambda _: {n: [tokens[n], tokens[n] * 0 - 100] for n in range(BATCH)})
    keep_batch(run, TrainState(1, BATCH))
    first = json.loads((tmp_path / "bad_batch_step_1.jsonl").read_text().splitlines()[0])
    assert first == {"sample": 0, "text": run.tokenizer.decode(tokens[0].tolist())}


def test_a_batch_that_cannot_be_written_does_not_hide_the_divergence(run, tmp_path):
    (tmp_path / "file").write_text("")
    run.config.log_folder = str(tmp_path / "file")
    assert "samples 0 to 3; their text cannot be written to" in keep_batch(run, TrainState(1, BATCH))
