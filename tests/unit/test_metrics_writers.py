"""Metrics as they are recorded, read back with the readers that people use for them; and writers that fail."""

import csv
import json
import logging
import math
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron.config.schema.run_keys import LoggingKeys
from megatron.errors import UserError
from megatron.events import EventLog, read_events
from megatron.metrics import services, writers
from megatron.metrics.local_writers import Csv, JsonLines
from megatron.metrics.prometheus import ScrapePort, Textfile, gauge_of
from megatron.metrics.writers import METRICS_FILE, MetricWriter, MetricWriters, Outlet, WriterSettings, open_writers


def settings(folder: Path | None, first_step: int = 0, **keys: object) -> WriterSettings:
    return WriterSettings(LoggingKeys(**keys), folder, first_step, {"num_layers": 2})


def rows(folder: Path, name: str = METRICS_FILE) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


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
    assert [[row["step"] for row in rows(tmp_path, name)] for name in aside] == [[3, 4], [1, 2, 3]]


def test_steps_that_cannot_be_set_aside_stay_where_they_are(tmp_path, monkeypatch):
    write(settings(tmp_path), 1, 2, 3)
    (tmp_path / f"{METRICS_FILE}.partial").mkdir()  # where the kept ones cannot be written
    with pytest.raises(UserError, match="cannot be written"):
        write(settings(tmp_path, first_step=1), 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_run_that_goes_back_on_a_full_disk_sets_steps_aside_once_there_is_room(tmp_path):
    told = []
    stream = MetricWriters(
        [Outlet("jsonl", JsonLines(tmp_path / METRICS_FILE, 0), retry_seconds=0)], EventLog(listeners=[told.append])
    )
    for number in (1, 2, 3):
        stream.write(number, step(number))
    blocked = tmp_path / f"{METRICS_FILE}.partial"  # where the kept ones cannot be written
    blocked.mkdir()
    stream.go_back(1)
    stream.write(2, step(20))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]
    blocked.rmdir()
    stream.write(3, step(30))
    stream.close()
    assert [event.details["failed"] for event in told] == [True, False]
    assert [row["train/lm_loss"] for row in rows(tmp_path)] == [1, 20, 30]
    assert [row["train/lm_loss"] for row in rows(tmp_path, "metrics.1.jsonl")] == [2, 3]


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


def test_tensorboard_hides_the_steps_that_a_run_went_back_from(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stream = open_writers(settings(None, tensorboard_dir=str(tmp_path / "board")))
    for number in (1, 2, 3):
        stream.write(number, step(number))
    stream.go_back(1)
    stream.write(2, step(20))
    stream.close()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/lm_loss")] == [(1, 1.0), (2, 20.0)]


def test_wandb_without_a_key_records_a_run_locally_and_says_so(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    caplog.set_level(logging.INFO, logger="megatron")
    logging.getLogger("megatron").propagate = True
    stream = open_writers(settings(tmp_path, use_wandb=True, wandb_run_name="seven"))
    stream.write(1, step(1))
    stream.go_back(0)  # W&B takes no step before its last: another run does
    stream.write(1, step(2))
    stream.close()
    runs = {path.stem for path in tmp_path.glob("wandb/offline-run-*/*.wandb")}
    assert len(runs) == 2
    assert "recorded locally" in caplog.text


def test_a_writer_that_cannot_write_fails_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^log_dir: .*/file/logs/metrics.jsonl cannot be written: Not a directory$"):
        open_writers(settings(tmp_path / "file" / "logs"))
    with pytest.raises(UserError, match=r"^tensorboard_dir \(.*/file/events\) cannot be written: "):
        open_writers(settings(None, tensorboard_dir=str(tmp_path / "file" / "events")))


def step(number: int) -> dict[str, float]:
    return {"train/lm_loss": float(number)}


def test_a_full_disk_is_told_once_and_nothing_is_lost_when_there_is_room_again(tmp_path, caplog):
    logging.getLogger("megatron").propagate = True
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    outlet = Outlet("jsonl", JsonLines(tmp_path / METRICS_FILE, 0), retry_seconds=0)
    stream = MetricWriters([outlet], EventLog(tmp_path))
    for number in (1, 2, 3):
        stream.write(number, step(number))
    (tmp_path / METRICS_FILE).unlink()
    stream.write(4, step(4))
    stream.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert caplog.text.count("has failed (No space left on device); the run goes on") == 1
    assert [(event.kind, event.step, event.details["failed"]) for event in read_events(tmp_path)] == [
        ("writer", 1, True),
        ("writer", 4, False),
    ]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within the block no file grows beyond `size` bytes: a write at the limit is cut short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_fits_in_part_is_taken_back_and_written_whole_later(tmp_path):
    outlet = Outlet("jsonl", JsonLines(tmp_path / METRICS_FILE, 0), retry_seconds=0)
    outlet.put(1, step(1))
    size = (tmp_path / METRICS_FILE).stat().st_size
    with files_up_to(size + 10):
        outlet.put(2, step(2))
    assert (tmp_path / METRICS_FILE).stat().st_size == size
    outlet.put(3, step(3))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


class Recorder(MetricWriter):
    """Takes steps while it is well; where it is blocked, not before it is freed."""

    def __init__(self, in_background: bool) -> None:
        self.in_background = in_background
        self.is_well, self.steps, self.threads = True, list[int](), set[str]()
        self.has_failed, self.is_free = threading.Event(), threading.Event()
        self.is_free.set()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.threads.add(threading.current_thread().name)
        self._take(step)

    def go_back(self, step: int) -> None:
        self._take(-step)

    def _take(self, step: int) -> None:
        self.is_free.wait()
        if not self.is_well:
            self.has_failed.set()
            raise ConnectionError("refused\nwith details")
        self.steps.append(step)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_writer_that_fails_costs_the_others_nothing_and_catches_up(in_background):
    well, ill = Recorder(False), Recorder(in_background)
    ill.is_well = False
    told = []
    stream = MetricWriters([Outlet("ill", ill, 0), Outlet("well", well)], EventLog(listeners=[told.append]))
    stream.write(1, step(1))
    assert ill.has_failed.wait(60)
    while not told:  # the failure is told with a later step
        stream.write(max(well.steps) + 1, step(1))
    assert ill.steps == [] and well.steps == list(range(1, len(well.steps) + 1))
    ill.is_well = True
    stream.write(max(well.steps) + 1, step(1))
    stream.close()
    assert ill.steps == well.steps
    assert told[0].text == (
        "the metric writer ill has failed (ConnectionError: refused); the run goes on, and it is retried"
    )
    assert [event.details for event in told] == [{"writer": "ill", "failed": failed} for failed in (True, False)]


def test_a_slow_writer_in_the_background_holds_up_no_step():
    slow = Recorder(True)
    slow.is_free.clear()
    stream = MetricWriters([Outlet("slow", slow)])
    for number in range(1, 7):
        stream.write(number, step(number))
    assert slow.steps == []
    slow.is_free.set()
    stream.close()
    assert slow.steps == [1, 2, 3, 4, 5, 6]
    assert slow.threads == {"metrics: slow"}


def test_the_run_does_not_wait_for_ever_for_a_writer_that_hangs(monkeypatch):
    monkeypatch.setattr(writers, "CLOSE_SECONDS", 0.1)
    told, stuck = [], Recorder(True)
    stuck.is_free.clear()
    stream = MetricWriters([Outlet("stuck", stuck)], EventLog(listeners=[told.append]))
    stream.write(1, step(1))
    stream.close()
    stuck.is_free.set()
    assert [event.text for event in told] == ["the metric writer stuck does not end; 1 logged steps are missing there"]


def test_what_was_never_written_is_counted_at_the_end():
    ill, told = Recorder(False), []
    ill.is_well = False
    stream = MetricWriters([Outlet("ill", ill)], EventLog(listeners=[told.append]))
    for number in (1, 2):
        stream.write(number, step(number))
    stream.close()
    assert told[-1].text.endswith("failed to the end (ConnectionError: refused); 2 logged steps are missing there")


def test_a_writer_that_is_away_for_long_loses_the_oldest_steps_and_says_how_many(monkeypatch):
    monkeypatch.setattr(writers, "MOST_WAITING", 3)
    ill, told = Recorder(False), []
    ill.is_well = False
    stream = MetricWriters([Outlet("ill", ill, 0)], EventLog(listeners=[told.append]))
    for number in range(1, 6):
        stream.write(number, step(number))
    ill.is_well = True
    stream.write(6, step(6))
    assert ill.steps == [4, 5, 6]
    assert "works again; 3 steps, for which there was no room, are missing there" in told[-1].text


def test_a_writer_that_was_away_when_the_run_went_back_gets_all_steps_in_their_order(monkeypatch):
    monkeypatch.setattr(writers, "MOST_WAITING", 4)
    ill, told = Recorder(False), []
    ill.is_well = False
    stream = MetricWriters([Outlet("ill", ill, 0)], EventLog(listeners=[told.append]))
    for number in (1, 2, 3):
        stream.write(number, step(number))
    stream.go_back(1)
    for number in (2, 3, 4):
        stream.write(number, step(number))
    ill.is_well = True
    stream.write(5, step(5))
    stream.close()
    assert ill.steps == [-1, 3, 4, 5]  # 1 to 3 and the second 2 had no room
    assert "works again; 4 steps, for which there was no room" in told[-1].text


def test_csv_has_a_row_for_each_value_and_goes_on_where_a_run_resumes(tmp_path):
    first = Csv(tmp_path / "metrics.csv", 0)
    first.write(1, {"train/lm_loss": 4.0, "validation/lm_loss/a,b": 5.0})
    first.write(2, step(2))
    first.close()
    second = Csv(tmp_path / "metrics.csv", 1)
    second.write(2, {"train/lm_loss": math.nan})
    second.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        found = list(csv.reader(file))
    assert found == [
        ["step", "name", "value"],
        ["1", "train/lm_loss", "4.0"],
        ["1", "validation/lm_loss/a,b", "5.0"],
        ["2", "train/lm_loss", "nan"],
    ]
    assert "2,train/lm_loss,2.0" in (tmp_path / "metrics.1.csv").read_text()


@pytest.mark.parametrize(
    ("name", "gauge"),
    [
        ("train/lm_loss", ("deepy_train_lm_loss", "")),
        ("validation/lm_loss/books-2", ("deepy_validation_lm_loss", "books-2")),
        ("gradient_norms/blocks.0.mlp.up.weight", ("deepy_gradient_norms", "blocks.0.mlp.up.weight")),
        ("tasks/lambada/acc,none", ("deepy_tasks", "lambada/acc,none")),
    ],
)
def test_a_metric_is_a_gauge_of_prometheus_whose_label_is_the_part_of_the_model_or_data(name, gauge):
    assert gauge_of(name) == gauge


def gauges(text: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels.get("of", "")): s.value for family in families for s in family.samples}


def test_prometheus_scrapes_the_latest_values_once_the_port_is_free():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told = []
        outlet = Outlet("prometheus", ScrapePort("127.0.0.1", port), 0.05)
        stream = MetricWriters([outlet], EventLog(listeners=[told.append]))
        stream.write(1, {"train/lm_loss": 4.0, "validation/lm_loss/books": 3.0})
        while not told:
            stream.write(1, {})
    assert f"(127.0.0.1:{port}: Address already in use)" in told[0].text
    stream.write(2, {"train/lm_loss": 2.0})
    while len(told) < 2:
        stream.write(2, {})
    found = gauges(urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
    assert found.pop(("deepy_last_update_timestamp_seconds", "")) == pytest.approx(time.time(), abs=60)
    assert found == {
        ("deepy_step", ""): 2.0,
        ("deepy_train_lm_loss", ""): 2.0,
        ("deepy_validation_lm_loss", "books"): 3.0,
    }
    stream.close()
    with pytest.raises(OSError):
        urlopen(f"http://127.0.0.1:{port}/metrics")


def test_the_textfile_is_replaced_as_a_whole_and_leaves_nothing_beside_it(tmp_path):
    writer = Textfile(tmp_path / "deepy.prom")
    writer.write(1, step(1))
    with (tmp_path / "deepy.prom").open() as old:
        writer.write(2, step(2))
        assert gauges(old.read())["deepy_step", ""] == 1.0
    assert gauges((tmp_path / "deepy.prom").read_text())["deepy_train_lm_loss", ""] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["deepy.prom"]


@pytest.mark.long  # the package takes seconds to import
def test_mlflow_has_the_values_and_the_configuration(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra trackers is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    place = f"file://{tmp_path}/runs"
    write(settings(None, use_mlflow=True, mlflow_tracking_uri=place, mlflow_run_name="seven"), 1, 2)
    client = mlflow.MlflowClient(place)
    [run] = client.search_runs([client.get_experiment_by_name("deepy").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params) == ("seven", "FINISHED", {"num_layers": "2"})
    history = client.get_metric_history(run.info.run_id, "train/lm_loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 4.0), (2, 2.0)]


def test_a_name_that_mlflow_does_not_take_is_mended():
    assert services._mlflow_name("validation/lm_loss/books#2,x") == "validation/lm_loss/books_2_x"


@pytest.mark.long
def test_comet_without_a_key_leaves_an_archive_to_upload(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml", reason="the extra trackers is not installed")
    from zipfile import ZipFile

    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(settings(tmp_path, use_comet=True, comet_project="p", comet_tags=("a", "b")), 1, 2)
    [archive] = (tmp_path / "comet").glob("*.zip")
    messages = ZipFile(archive).read("messages.json").decode()
    assert messages.count('"train/lm_loss"') >= 2
    assert '"num_layers"' in messages


@pytest.mark.long
def test_trackio_has_the_values(tmp_path):
    pytest.importorskip("trackio", reason="the extra trackers is not installed")
    import sqlite3
    import subprocess

    # its folder is chosen when it is imported
    script = (
        "from tests.unit.test_metrics_writers import settings, write\n"
        "write(settings(None, use_trackio=True, trackio_run_name='seven'), 1, 2)"
    )
    root = Path(__file__).parents[2]
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path),
        "PYTHONPATH": str(root),
    }
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path)
    with sqlite3.connect(tmp_path / "deepy.db") as base:
        found = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(values)["train/lm_loss"]) for name, step, values in found] == [
        ("seven", 1, 4.0),
        ("seven", 2, 2.0),
    ]


@pytest.mark.parametrize(
    ("key", "package", "extra"),
    [("use_wandb", "wandb", "logging"), ("use_mlflow", "mlflow", "trackers"), ("use_comet", "comet_ml", "trackers")],
)
def test_a_missing_package_is_said_before_the_run_with_what_installs_it(monkeypatch, key, package, extra):
    monkeypatch.setattr(services, "find_spec", {package: None}.__getitem__)
    with pytest.raises(
        UserError, match=rf"^{key} \(true\) needs the package {package}, .*`pip install 'deepy\[{extra}\]'`"
    ):
        open_writers(settings(None, **{key: True}))


@pytest.mark.parametrize(
    "foreign",
    [b"epoch,loss\n1,2\n", b'[1, 2]\n"text"\n', b'{"loss": 1}\n', b"\xff\xfe\0\n", b"\0\0\0\n", b'{"step": "2"}\n'],
)
def test_lines_that_are_no_metrics_are_set_aside_and_not_lost(tmp_path, foreign):
    write(settings(tmp_path), 1)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(foreign)
    write(settings(tmp_path, first_step=1), 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.1.jsonl").read_bytes() == foreign


def test_a_service_is_told_once_that_a_run_has_ended():
    """`close` follows every failure, and the end of the run."""
    told = []
    writer = services.Trackio.__new__(services.Trackio)  # without its package
    writer.run = SimpleNamespace(finish=lambda: told.append("ended"))
    writer.close()
    writer.close()
    assert told == ["ended"]
