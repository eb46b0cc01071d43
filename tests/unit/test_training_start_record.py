"""What rank 0 records of a start, and of the end of a run that deepy.py did not start."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.checkpoint.state import TrainState
from megatron.config.load import config_from_flat
from megatron.errors import RunError
from megatron.events import EventLog, read_events
from megatron.record.start import read_starts
from megatron.tokenizer.build import build_tokenizer
from megatron.training.run import told_end
from megatron.training.start_record import CODE, look_around, record_start
from tests import tiny
from tests.ranks.run import one_rank

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 8}


@pytest.fixture(scope="module")
def grid():
    with one_rank() as grid:
        yield grid


@pytest.fixture
def run(grid, tmp_path, monkeypatch):
    """Of a run what is looked at, on its only rank, which deepy.py did not start."""
    monkeypatch.delenv("DEEPY_RUN_FOLDER", raising=False)
    monkeypatch.setenv("RANK", "0")
    command = "cat >> told.jsonl; echo >> told.jsonl"
    config = config_from_flat(MODEL | {"log_dir": str(tmp_path), "data_impl": "mock", "alert_command": command})
    plain = tiny.run(SimpleNamespace(grid=grid), tiny.plan(), 0, 4)
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer("CharLevelTokenizer", None, None, None)
    return replace(plain, config=config, tokenizer=tokenizer, events=EventLog(tmp_path))


def test_a_start_is_recorded_with_step_layout_and_fingerprints_and_without_secrets(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hidden-1")
    monkeypatch.setenv("WANDB_API_KEY", "hidden-2")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    surroundings = look_around(run.config.log_folder)
    record_start(run, TrainState(7, 56, 448), tmp_path / "global_step7", "resuming", surroundings)
    [start] = read_starts(tmp_path)
    facts = start.facts
    assert (facts["step"], facts["consumed_samples"], facts["consumed_tokens"]) == (7, 56, 448)
    assert facts["checkpoint"] == str(tmp_path / "global_step7") and facts["beginning"] == "resuming"
    assert facts["layout"]["world_size"] == 1 and len(facts["hosts"]) == 1
    assert facts["batch"]["global_size"] == tiny.plan().batch.global_size
    assert facts["tokenizer"]["fingerprint"] == run.tokenizer.fingerprint and facts["data"] == {}
    assert facts["versions"]["torch"] and facts["hardware"]["threads"] > 0 and facts["code"]["folder"] == str(CODE)
    assert facts["environment"]["NCCL_DEBUG"] == "WARN"
    everything = "".join(path.read_text(errors="replace") for path in start.folder.rglob("*") if path.is_file())
    assert "hidden-" not in everything and "HF_TOKEN" not in json.dumps(facts["environment"])


def test_without_a_log_folder_nothing_is_looked_up_and_other_ranks_record_nothing(run, tmp_path, monkeypatch):
    assert look_around(None) is None
    monkeypatch.setenv("RANK", "1")
    assert look_around(run.config.log_folder) is None
    record_start(run, TrainState(), None, "fresh", None)
    assert read_starts(tmp_path) == []


@pytest.mark.parametrize("break_it", [lambda folder, _: (folder / "starts").touch(), lambda _, patch: patch()])
def test_a_record_that_cannot_be_written_is_a_warning(run, tmp_path, caplog, monkeypatch, break_it):
    def patch():
        monkeypatch.setattr("megatron.training.start_record.identity_of", lambda *_: 1 / 0)

    break_it(tmp_path, patch)
    with caplog.at_level(logging.WARNING):
        record_start(run, TrainState(), None, "fresh", look_around(run.config.log_folder))
    assert f"the start is not recorded in {tmp_path}: " in caplog.text


def ended(run, error: BaseException | None = None, reason: str | None = None) -> tuple[list, list]:
    """Kinds and texts of the events, and of the alerts."""
    folder = Path(run.config.log_folder)
    try:
        with told_end(run, SimpleNamespace(reason=reason)):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    alerts = folder / "told.jsonl"
    told = [json.loads(line) for line in alerts.read_text().splitlines()] if alerts.exists() else []
    return [(one.kind, one.text) for one in read_events(folder)], [(one["kind"], one["text"]) for one in told]


@pytest.mark.parametrize(
    ("error", "reason", "kind", "text"),
    [
        (None, None, "finish", "done"),
        (None, "SIGTERM", "finish", "stopped by SIGTERM"),
        (RunError("the disk is full"), None, "failure", "the disk is full"),
        (KeyboardInterrupt(), None, "failure", "KeyboardInterrupt"),
    ],
)
def test_without_deepy_the_end_is_an_event_and_an_alert(run, error, reason, kind, text):
    assert ended(run, error, reason) == ([(kind, text)], [(kind, text)])


def test_deepy_tells_the_end_of_what_it_has_started(run, monkeypatch):
    monkeypatch.setenv("DEEPY_RUN_FOLDER", "somewhere")
    assert ended(run) == ([], [])
