"""Metrics on disk, read back with the readers that people use for them."""

import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.config.schema.run_keys import LoggingKeys
from megatron.errors import RunError, UserError
from megatron.metrics.writers import METRICS_FILE, JsonLines, WriterSettings, open_writers


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
    with pytest.raises(UserError, match=r"^log_dir: .*/file/logs/metrics.jsonl cannot be written: Not a directory$"):
        open_writers(settings(tmp_path / "file" / "logs"))
    with pytest.raises(UserError, match=r"^tensorboard_dir \(.*/file/events\) cannot be written: "):
        open_writers(settings(None, tensorboard_dir=str(tmp_path / "file" / "events")))


def test_a_full_disk_ends_the_run_with_the_name_of_the_file():
    writer = JsonLines(Path("/dev/full"), 0)
    with pytest.raises(RunError, match=r"^/dev/full cannot be written: No space left on device$"):
        writer.write(1, {"train/lm_loss": 1.0})
    writer.close()


@pytest.mark.parametrize(
    "foreign",
    [b"epoch,loss\n1,2\n", b'[1, 2]\n"text"\n', b'{"loss": 1}\n', b"\xff\xfe\0\n", b"\0\0\0\n", b'{"step": "2"}\n'],
)
def test_lines_that_are_no_metrics_are_set_aside_and_not_lost(tmp_path, foreign):
    write(settings(tmp_path), 1)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(foreign)
    before = (tmp_path / METRICS_FILE).read_bytes()
    write(settings(tmp_path, first_step=1), 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == before


def test_what_wandb_refuses_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(UserError, match=r"^use_wandb: the run cannot be started .*WANDB_MODE=offline.*\): \w+Error: "):
        open_writers(settings(tmp_path, use_wandb=True, wandb_project="a/b#c"))


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"the package wandb is not installed"):
        open_writers(settings(tmp_path, use_wandb=True))
