"""Writers that fail end no run and catch up; Prometheus has data for every query of the dashboard on training."""

import csv
import json
import shutil
import signal
import socket
import time
import urllib.parse
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path
from urllib.request import urlopen

import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron.events import read_events
from megatron.launch.node.network import free_port
from tests.end_to_end.commands import ROOT, SMALL, json_lines, run
from tests.end_to_end.processes import deepy, end, started, wait_for

DASHBOARD = json.loads((ROOT / "docs" / "serving" / "grafana.json").read_text())
ON_TRAINING = [
    target["expr"]
    for panel in list(dropwhile(lambda panel: panel["title"] != "Training", DASHBOARD["panels"]))[1:]
    for target in panel["targets"]
]
WATCHED = """
log_interval: 10
log_dir: logs
use_csv: true
prometheus_textfile: deepy.prom
peak_theoretical_tflops: 0.1
"""
# besides those of WATCHED; MLflow's address is one where nothing answers
ALL_WRITERS = """
tensorboard_dir: board
use_wandb: true
use_comet: true
use_trackio: true
use_mlflow: true
mlflow_tracking_uri: http://127.0.0.1:9
log_param_norm: true
log_grad_norm: true
log_optimizer_states: true
log_activations: true
log_gradient_noise_scale: true
save: saved
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A configuration, and a log folder in which the disk is full for metrics.csv."""
    (tmp_path / "small.yml").write_text(SMALL.replace("log_interval: 1\n", "") + WATCHED)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").symlink_to("/dev/full")
    return tmp_path


def gauges_asked_for() -> Iterator[str]:
    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node.name)

    found: list[str] = []
    for query in ON_TRAINING:
        promql_parser.walk(promql_parser.parse(query), visit)
    return iter(found)


def test_a_full_disk_and_a_taken_port_end_no_run(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(folder, "train.py", "small", f"prometheus_port={taken.getsockname()[1]}")
    output = done.stdout + done.stderr
    assert output.count("the metric writer csv has failed (No space left on device); the run goes on") == 1
    assert output.count("the metric writer prometheus has failed (127.0.0.1:") == 1
    assert "the metric writer csv has failed to the end (No space left on device); 2 logged steps are missing" in output
    first, last = json_lines(folder / "logs" / "metrics.jsonl")
    assert (last["train/samples"], last["train/tokens"]) == (160, 160 * 32)
    assert 0 < last["train/epochs"] < 1e-3
    assert last["runtime/peak_memory_bytes"] > 1e8
    phases = ("data_wait", "forward", "backward", "optimizer")
    shares = [
        sum(row[f"runtime/{one}_seconds"] for one in phases) / row["runtime/iteration_time"] for row in (first, last)
    ]
    assert max(shares) > 0.5 and all(share < 1.05 for share in shares)
    assert first["train/param_norm"] != last["train/param_norm"]
    assert "data wait" not in done.stdout, "the phases are in the line with wall_clock_breakdown only"
    names = {family.name for family in text_string_to_metric_families((folder / "deepy.prom").read_text())}
    assert set(gauges_asked_for()) <= names


@pytest.mark.long
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (Debian: prometheus)")
def test_prometheus_has_data_for_the_dashboard_while_three_writers_fail_and_two_come_back(folder, monkeypatch):
    for package in ("comet_ml", "mlflow", "trackio"):
        pytest.importorskip(package, reason="the extra trackers is not installed")
    for name in ("HOME", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(folder))
    for name in ("WANDB_API_KEY", "COMET_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (folder / "all.yml").write_text(ALL_WRITERS)
    logs = folder / "logs"
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with (
        taken,
        deepy(
            folder, "train.py", "small", "all", "num_gpus=2", "train_iters=1000000", f"prometheus_port={port}"
        ) as training,
    ):
        wait_for(lambda: failed(logs) == {"csv", "prometheus", "mlflow"}, training)
        taken.close()
        (logs / "metrics.csv").unlink()
        with prometheus(folder, port) as answers:
            wait_for(lambda: all(answers(query) for query in ON_TRAINING), training)
            assert answers("deepy_step")[0]["metric"]["job"] == "training"
            assert len(answers("deepy_gradient_norms")) > 20
            assert not answers("deepy_no_such_metric")
        wait_for(lambda: failed(logs) == {"mlflow"}, training)
        code, out, err = end(training, signal.SIGTERM)
    assert code == 0, out + err
    assert (out + err).count("the metric writer mlflow has failed (") == 1
    steps = [row["step"] for row in json_lines(logs / "metrics.jsonl")]
    assert steps == [*range(10, steps[-1] - steps[-1] % 10 + 1, 10), *([steps[-1]] if steps[-1] % 10 else [])]
    with (logs / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["name"] == "train/lm_loss"] == steps
    assert steps_on_the_board(folder / "board") == steps
    assert list(logs.glob("wandb/offline-run-*/*.wandb"))
    assert list(logs.glob("comet/*.zip"))
    assert (folder / "deepy.db").is_file()


def failed(logs: Path) -> set[str]:
    """The writers that fail now, by the events."""
    state = {event.details["writer"]: event.details["failed"] for event in read_events(logs) if event.kind == "writer"}
    return {writer for writer, fails in state.items() if fails}


def prometheus(folder: Path, port: int):
    """A Prometheus that scrapes `port`: within the context, a function of a query that returns what it finds."""
    own = free_port()
    scrape = f"{{job_name: training, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}"
    (folder / "prometheus.yml").write_text(f"global: {{scrape_interval: 1s}}\nscrape_configs: [{scrape}]\n")
    options = {"config.file": "prometheus.yml", "storage.tsdb.path": "series", "web.listen-address": f"127.0.0.1:{own}"}
    return Scraping(folder, own, [f"--{name}={value}" for name, value in options.items()])


class Scraping:
    """Prometheus as a process."""

    def __init__(self, folder: Path, port: int, options: list[str]) -> None:
        self.folder, self.port, self.options = folder, port, options

    def __enter__(self) -> "Scraping":
        self.running = started(self.folder, ["prometheus", "--log.level=error", *self.options])
        self.process = self.running.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self.running.__exit__(None, None, None)

    def __call__(self, query: str) -> list[dict]:
        """As Grafana asks, with its variables filled in."""
        filled = query.replace("$instance", ".*")
        address = f"http://127.0.0.1:{self.port}/api/v1/query?{urllib.parse.urlencode({'query': filled})}"
        for _ in range(100):
            assert self.process.poll() is None, self.process.communicate()
            try:
                return json.load(urlopen(address))["data"]["result"]
            except OSError:  # it does not listen yet
                time.sleep(0.1)
        raise AssertionError("Prometheus does not answer")


def steps_on_the_board(board: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("train/lm_loss")]
