"""Metrics as they lie on disk, read back with the readers of those who read them."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.config.schema.run_keys import LoggingKeys
from megatron.metrics.writers import METRICS_FILE, WriterSettings, open_writers


def settings(folder: Path | None, first_step: int = 0, **keys: object) -> WriterSettings:
    return WriterSettings(LoggingKeys(**keys), folder, first_step, {"num_layers": 2})


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def write(target: WriterSettings, *steps: int) -> None:
    writers = open_writers(target)
    for step in steps:
        writers.write(step, {"train/lm_loss": 4.0 / step})
    writers.close()


def test_each_logged_step_is_one_json_object(tmp_path):
    write(settings(tmp_path / "logs"), 1, 2)
    assert rows(tmp_path / "logs") == [{"step": 1, "train/lm_loss": 4.0}, {"step": 2, "train/lm_loss": 2.0}]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writers = open_writers(settings(tmp_path))
    writers.write(1, {"train/lm_loss": 1.0})
    assert len(rows(tmp_path)) == 1
    writers.close()


def test_a_step_without_metrics_leaves_no_row(tmp_path):
    writers = open_writers(settings(tmp_path))
    writers.write(1, {})
    writers.close()
    assert rows(tmp_path) == []


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    writers = open_writers(settings(tmp_path))
    writers.write(1, {"train/lm_loss": math.nan, "train/grad_norm": math.inf, "train/learning_rate": 0.1})
    writers.close()
    assert rows(tmp_path) == [{"step": 1, "train/lm_loss": None, "train/grad_norm": None, "train/learning_rate": 0.1}]


def test_a_resumed_run_goes_on_behind_the_steps_it_keeps(tmp_path):
    write(settings(tmp_path), 1, 2)
    write(settings(tmp_path, first_step=2), 3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS_FILE]


def test_steps_that_are_trained_again_are_set_aside_and_not_lost(tmp_path):
    write(settings(tmp_path), 1, 2, 3, 4)
    write(settings(tmp_path, first_step=2), 3)
    write(settings(tmp_path, first_step=0), 1)
    assert [row["step"] for row in rows(tmp_path)] == [1]
    aside = sorted(path.name for path in tmp_path.iterdir() if path.name != METRICS_FILE)
    assert aside == ["metrics.1.jsonl", "metrics.2.jsonl"]
    assert len((tmp_path / "metrics.1.jsonl").read_text().splitlines()) == 4


def test_a_line_that_a_crash_cut_short_does_not_stop_the_next_run(tmp_path):
    write(settings(tmp_path), 1, 2)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "train/lm_l')
    write(settings(tmp_path, first_step=2), 3)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(settings(None), 1)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(settings(None, tensorboard_dir=str(tmp_path / "board")), 1, 2)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/lm_loss")] == [(1, 4.0), (2, 2.0)]


def test_wandb_without_a_key_records_a_run_locally_and_says_so(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    caplog.set_level(logging.INFO, logger="megatron")
    logging.getLogger("megatron").propagate = True
    write(replace(settings(tmp_path, use_wandb=True, wandb_run_name="seven")), 1)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert "recorded locally" in caplog.text


def test_a_writer_that_cannot_write_fails_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        open_writers(settings(tmp_path / "file" / "logs"))
