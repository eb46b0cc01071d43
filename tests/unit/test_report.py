"""Reports: what is read from a run's files, what is kept of long runs, and what is refused."""

import csv
import hashlib
import http.client
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.errors import UserError
from megatron.events import Event, EventLog
from megatron.record.start import Start
from megatron.report import tables
from megatron.report.command import run as report_command
from megatron.report.document import data, make_report, page
from megatron.report.live import make_server
from megatron.report.metrics_file import MetricsFile, Series
from megatron.report.run_folder import RunFolder, RunRecord, Sample
from megatron.report.thinning import thinned

LIMIT = 3_000_000  # bytes of a page


def line(step: int, loss: float | None, **more: object) -> str:
    return json.dumps({"step": step, "train/lm_loss": loss, **more}) + "\n"


def make_run(folder: Path, *lines: str, name: str = "metrics.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(lines))
    return folder


def losses(file: MetricsFile) -> list[tuple[int, float]]:
    series = file.split()[1]["train/lm_loss"]
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def read(folder: Path) -> RunRecord:
    return RunFolder(folder).read()


# metrics


def test_a_growing_file_is_followed_line_by_line(tmp_path):
    path = make_run(tmp_path, line(1, 4.0), line(2, 3.0)[:9]) / "metrics.jsonl"
    file = MetricsFile(path)
    file.update()
    assert losses(file) == [(1, 4.0)] and file.is_cut
    with path.open("a") as rest:
        rest.write(line(2, 3.0)[9:] + line(3, 2.5))
    file.update()
    assert losses(file) == [(1, 4.0), (2, 3.0), (3, 2.5)] and not file.is_cut and not file.damaged


def test_a_file_that_was_replaced_or_emptied_is_read_again(tmp_path):
    path = make_run(tmp_path, line(1, 4.0), line(2, 3.0)) / "metrics.jsonl"
    file = MetricsFile(path)
    file.update()
    (tmp_path / "new").write_text(line(1, 5.0) + line(2, 6.0) + line(3, 7.0))
    (tmp_path / "new").rename(path)
    file.update()
    assert losses(file) == [(1, 5.0), (2, 6.0), (3, 7.0)]
    path.write_text(line(1, 8.0))
    file.update()
    assert losses(file) == [(1, 8.0)]
    path.write_text(line(1, 9.0) + line(2, 9.0))  # of the same number, as the file system may give it to another file
    file.update()
    assert losses(file) == [(1, 9.0), (2, 9.0)]


@pytest.mark.parametrize(
    "damage",
    ["{", "[1, 2]", "3", '{"train/lm_loss": 3}', '{"step": "2"}', '{"step": true}', '{"step": -1}', "\x00\x00"],
)
def test_damaged_lines_are_left_out_and_counted(tmp_path, damage):
    record = read(make_run(tmp_path, line(1, 4.0), damage + "\n", "\n", line(3, 2.0)))
    assert record.steps.tolist() == [1, 3]
    assert record.notes == ["1 damaged line of metrics.jsonl left out"]


def test_what_is_no_finite_number_is_a_gap(tmp_path):
    text = (
        '{"step": 3, "train/lm_loss": NaN}\n{"step": 4, "train/lm_loss": Infinity}\n{"step": 5, "train/lm_loss": "x"}\n'
    )
    huge = '{"step": 6, "train/lm_loss": 1e999}\n{"step": 7, "train/lm_loss": ' + "9" * 400 + "}\n"
    record = read(make_run(tmp_path, line(1, 4.0), line(2, None), text, huge, line(8, 2.0)))
    assert record.steps.tolist() == [*range(1, 9)] and not record.notes
    assert np.isnan(record.metrics["train/lm_loss"].values).tolist() == [False, *[True] * 6, False]


def test_steps_trained_again_replace_those_before_which_are_kept_as_set_aside(tmp_path):
    first = [line(step, 5.0 - step) for step in range(1, 6)]
    again = [line(step, 9.0 - step) for step in range(3, 7)]
    record = read(make_run(tmp_path, *first, *again))
    series = record.metrics["train/lm_loss"]
    assert series.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert series.values.tolist() == [4.0, 3.0, 6.0, 5.0, 4.0, 3.0]
    assert [one.steps.tolist() for one in record.set_aside] == [[4, 5]]


def test_files_of_earlier_attempts_show_what_is_different_in_them(tmp_path):
    make_run(tmp_path, line(1, 4.0), line(2, 3.0), line(3, 2.0), name="metrics.1.jsonl")
    record = read(make_run(tmp_path, line(1, 4.0), line(2, 3.5)))
    assert [(one.steps.tolist(), one.values.tolist()) for one in record.set_aside] == [([2, 3], [3.0, 2.0])]


def test_tokens_and_training_time_follow_from_rates_also_where_the_batch_grows(tmp_path):
    rates = {"runtime/iteration_time": 0.5, "runtime/tokens_per_sec": 200.0}
    grown = {"runtime/iteration_time": 1.0, "runtime/tokens_per_sec": 400.0}
    validation = json.dumps({"step": 15, "validation/lm_loss": 3.0}) + "\n"
    record = read(make_run(tmp_path, line(10, 4.0, **rates), validation, line(20, 3.0, **grown)))
    assert record.tokens is not None and record.seconds is not None
    assert record.tokens.tolist() == [1000, 1000 + 5 * 400, 1000 + 10 * 400]
    assert record.seconds.tolist() == [5, 10, 15]


def test_tokens_are_those_that_the_run_recorded(tmp_path):
    rates = {"runtime/iteration_time": 0.5, "runtime/tokens_per_sec": 200.0}
    validation = json.dumps({"step": 15, "validation/lm_loss": 3.0}) + "\n"
    rows = [line(step, 4.0, **rates, **{"train/tokens": tokens}) for step, tokens in ((10, 700), (20, 1500))]
    record = read(make_run(tmp_path, rows[0], validation, rows[1]))
    assert record.tokens is not None and record.tokens.tolist() == [700, 1100, 1500]


def test_without_rates_there_are_steps_alone(tmp_path):
    record = read(make_run(tmp_path, line(1, 4.0)))
    assert record.tokens is None and record.seconds is None
    assert "tokens" not in tables.overview([record]).header


# thinning


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400), st.integers(1, 30))
def test_of_each_stretch_the_extremes_and_a_gap_are_kept(values, stretches):
    series = Series(np.arange(len(values)) * 3, np.array(values))
    kept, means = (found := thinned(series, stretches)).kept, found.means
    points = dict(zip(kept.steps.tolist(), kept.values.tolist(), strict=True))
    assert list(points) == sorted(points) and {0, (len(values) - 1) * 3} <= points.keys()
    assert all(value == values[step // 3] or math.isnan(values[step // 3]) for step, value in points.items())
    if means is None:
        assert len(points) == len(values) <= 4 * stretches
        return
    assert len(points) <= 3 * stretches + 2
    size = -(-len(values) // stretches)
    numbers_of_means = 0
    for start in range(0, len(values), size):
        stretch = values[start : start + size]
        drawn = [points[step * 3] for step in range(start, start + len(stretch)) if step * 3 in points]
        numbers = [value for value in stretch if value == value]
        if numbers:
            assert {min(numbers), max(numbers)} <= set(drawn)
            assert means.values[numbers_of_means] == pytest.approx(sum(numbers) / len(numbers), abs=1e-6)
            numbers_of_means += 1
        if len(numbers) < len(stretch):
            assert any(value != value for value in drawn)
    assert len(means.values) == numbers_of_means


def test_a_spike_of_one_step_in_a_long_run_is_in_the_page(tmp_path):
    rows = [line(step, 3.0 + step % 7 / 100) for step in range(1, 30_001)]
    rows[20_000] = line(20_001, 77.25)
    report = make_report([read(make_run(tmp_path, *rows))])
    curve = json.loads(data(report))["runs"][0]["curves"]["train/lm_loss"]
    assert len(curve["steps"]) < 4000
    assert curve["values"][curve["steps"].index(20_001)] == 77.25
    assert max(curve["means"]["values"]) < 6


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_million_steps_are_written_in_seconds_and_are_below_3_mb(tmp_path):
    names = ["train/grad_norm", "train/learning_rate", *(f"runtime/{name}" for name in "abcdefg")]
    values = np.random.default_rng(0).random((1000, len(names)))
    tails = [", ".join(f'"{name}": {value}' for name, value in zip(names, row, strict=True)) for row in values]
    with (make_run(tmp_path / "run") / "metrics.jsonl").open("w") as file:
        for step in range(1, 1_000_001):
            file.write(f'{{"step": {step}, "train/lm_loss": {99.5 if step == 654_321 else 3}, {tails[step % 1000]}}}\n')
    started = time.process_time()
    report_command([str(tmp_path / "run"), "-o", str(tmp_path / "report.html")])
    seconds, size = time.process_time() - started, (tmp_path / "report.html").stat().st_size
    print(f"{seconds:.1f} s of a core, {size / 1e6:.2f} MB")
    assert size < LIMIT
    assert seconds < 60  # 6 on the machine where it was written
    rows = [row for row in (tmp_path / "report.csv").read_text().splitlines() if row.startswith("run,654321,")]
    assert len(rows) == 1 and rows[0].endswith(",99.5")


@pytest.mark.parametrize("number", [1, 3, pytest.param(40, marks=pytest.mark.long)])
def test_whatever_runs_hold_the_page_is_below_3_mb_and_says_what_is_left_out(tmp_path, number):
    series = Series(np.arange(5000), np.random.default_rng(1).normal(size=5000))
    names = [
        "train/lm_loss",
        *(f"layers/{number}/norm" for number in range(4000)),
        *(f"tasks/{n}/acc" for n in range(40)),
    ]
    text = "some words and \u00fcml\u00e4uts " * 500
    facts = {"step": 5, "time": 1.7e9, "command": [text], "hosts": [text], "layout": {"pipe": 2}}
    runs = [
        RunRecord(
            f"run{n}",
            tmp_path,
            series.steps,
            dict.fromkeys(names, series),
            series.values,
            series.values,
            [series] * 30,
            [Event("spike", text, step, 1.7e9) for step in range(3000)],
            [Start(tmp_path, facts)] * 400,
            {f"key_{key}": f"{n} {text}" for key in range(200)},
            {"a.yml": text * 20, "b.yml": text * 20},
            [Sample(step, text, text) for step in range(500)],
        )
        for n in range(number)
    ]
    report = make_report(runs)
    assert len(page(report).encode()) < LIMIT
    assert report.left_out and len(report.left_out) + len(report.curves[0]) == len(names)
    assert "train/lm_loss" in report.curves[0]
    told = json.loads(data(report))
    assert told["left_out_count"] == len(report.left_out)
    assert all("not shown" in run["events"]["note"] and run["samples_left_out"] for run in told["runs"])
    assert all(run["samples"][-1]["step"] == 499 and run["starts"]["note"] for run in told["runs"])


# what else is read


def start_of(folder: Path, number: int, **facts: object) -> None:
    place = folder / "starts" / f"{number:04}"
    (place / "config").mkdir(parents=True)
    (place / "config" / "1-small.yml").write_text("num_layers: 2\n")
    (place / "start.json").write_text(json.dumps({"step": 0, **facts}))


def test_a_resume_on_another_layout_says_so(tmp_path):
    EventLog(tmp_path).record("resume", "resumed from there", 10)
    now = time.time()
    start_of(tmp_path, 1, time=now - 500, layout={"pipe": 1, "data": 2, "zero_stage": 1})
    start_of(tmp_path, 2, time=now, layout={"pipe": 2, "data": 1, "zero_stage": 1}, config={"num_layers": 2})
    record = read(make_run(tmp_path, line(1, 4.0)))
    assert record.events[0].text == "resumed from there; on another layout: pipeline 1 → 2, data 2 → 1"
    assert record.config == {"num_layers": 2} and record.config_files == {"1-small.yml": "num_layers: 2\n"}


def test_a_run_without_a_record_of_its_starts_has_the_configuration_of_its_newest_checkpoint(tmp_path):
    for step in (9, 10):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "config.json").write_text(json.dumps({"num_layers": step, "my_key": "abc"}))
    make_run(tmp_path / "logs", line(1, 4.0))
    assert read(tmp_path).config == {"num_layers": 10, "my_key": "(withheld)"}
    assert read(tmp_path).name == tmp_path.name


def test_differences_are_told_by_key_and_a_key_that_is_not_set_has_its_default(tmp_path):
    configs = [
        {"num_layers": 2, "optimizer": {"type": "Adam", "params": {"lr": 2e-3}}},
        {"num_layers": 2, "log_interval": 5},
    ]
    empty = np.empty(0, np.int64)
    table = tables.difference(
        [RunRecord(name, tmp_path, empty, {}, config=c) for name, c in zip("ab", configs, strict=True)]
    )
    assert table is not None and table.header == ["key", "a", "b"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["log_interval"] == ["100 (default)", "5"]
    assert rows["optimizer.params.lr"] == ["0.002", "0.001 (default)"] and "num_layers" not in rows


def test_of_the_samples_of_a_step_the_last_counts_and_those_of_the_last_step_stay_when_room_is_short(tmp_path):
    rows = [{"step": step, "number": 0, "prompt": "p", "text": f"{step} " + "x" * 3000} for step in range(1, 201)]
    make_run(
        tmp_path, *(json.dumps(row) + "\n" for row in [*rows, rows[-1] | {"text": "newer"}]), "{", name="samples.jsonl"
    )
    record = read(make_run(tmp_path, line(1, 4.0)))
    assert len(record.samples) == 200 and record.samples[-1].text == "newer"
    shown = json.loads(data(make_report([record])))["runs"][0]
    assert shown["samples"][-1]["text"] == "newer" and 10 < len(shown["samples"]) < 80
    assert len(shown["samples"]) + shown["samples_left_out"] == 200


def test_samples_of_steps_that_a_run_went_back_from_are_not_its_own(tmp_path):
    rows = [{"step": step, "prompt": "p", "text": str(step), "time": 100.0 + step} for step in (10, 20, 30)]
    rows.append({"step": 20, "prompt": "p", "text": "again", "time": 200.0})
    make_run(tmp_path, *(json.dumps(row) + "\n" for row in rows), name="samples.jsonl")
    back = {"kind": "rewind", "text": "went back", "step": 35, "time": 150.0, "details": {"to_step": 15}}
    make_run(tmp_path, json.dumps(back) + "\n", name="events.jsonl")
    record = read(make_run(tmp_path, line(10, 4.0), line(20, 3.0)))
    assert [sample.text for sample in record.samples] == ["10", "again"]


def test_every_text_of_a_prompt_is_a_sample(tmp_path):
    rows = [{"step": 1, "number": 0, "sample": number, "prompt": "p", "text": str(number)} for number in range(3)]
    make_run(tmp_path, *(json.dumps(row) + "\n" for row in rows), name="samples.jsonl")
    assert [sample.text for sample in read(make_run(tmp_path, line(1, 4.0))).samples] == ["0", "1", "2"]


def test_steps_done_before_the_first_start_here_take_no_time(tmp_path):
    start_of(tmp_path, 1, step=50_000)
    record = read(
        make_run(tmp_path, *(line(step, 4.0, **{"runtime/iteration_time": 2.0}) for step in (50_010, 50_020)))
    )
    assert record.seconds is not None and record.seconds.tolist() == [20.0, 40.0]


def test_an_event_without_a_step_is_marked_where_the_one_before_is_and_skipped_updates_are_marks(tmp_path):
    events = EventLog(tmp_path)
    events.record("checkpoint", "saved", 20)
    events.record("restart", "started again")
    (tmp_path / "events.jsonl").open("a").write('{"kind": "spike", "text": 3, "step": "x", "time": "y"}\n')
    skips = [{"train/skipped_steps": count, "train/skipped_updates": count} for count in (0, 2)]
    run = make_run(tmp_path, line(10, 4.0, **skips[0]), line(20, 3.0, **skips[1]))
    marks = json.loads(data(make_report([read(run)])))["runs"][0]["marks"]
    assert [(mark["kind"], mark["step"]) for mark in marks] == [
        ("checkpoint", 20), ("restart", 20), ("spike", 20), ("skipped_update", 20),
    ]  # fmt: skip


def test_skipped_steps_are_drawn_only_where_there_were_some(tmp_path):
    none = read(make_run(tmp_path / "none", line(1, 4.0, **{"train/skipped_steps": 0})))
    some = read(make_run(tmp_path / "some", line(1, 4.0, **{"train/skipped_steps": 2})))
    assert ["train/skipped_steps" in curves for curves in make_report([none]).curves] == [False]
    assert ["train/skipped_steps" in curves for curves in make_report([none, some]).curves] == [True, True]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [read(make_run(tmp_path / name / "run" / "logs", line(1, 4.0))) for name in ("a", "b")]
    assert [run.name for run in runs] == ["run", "run"]
    assert [run.name for run in make_report(runs).runs] == ["a/run/logs", "b/run/logs"]


# files


def test_the_command_writes_the_page_its_tables_and_its_figures(tmp_path):
    loss = {"validation/lm_loss": 3.5, "validation/lm_loss_ppl": 33.1}
    make_run(tmp_path / "a|b", line(10, 4.0), line(20, None, **loss))
    EventLog(tmp_path / "a|b").record("spike", "loss <b>9</b> | 3", 20)
    report_command([str(tmp_path / "a|b"), "-o", str(tmp_path / "new" / "report.html")])
    text = (tmp_path / "new" / "report.md").read_text()
    assert r"# Deepy report: a\|b" in text and r"loss \<b\>9\</b\> \| 3" in text
    assert "3.5 at step 20" in text
    with (tmp_path / "new" / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["step"], row["train/lm_loss"], row["validation/lm_loss"]) for row in rows] == [
        ("a|b", "10", "4", ""), ("a|b", "20", "", "3.5"),
    ]  # fmt: skip
    report_command([str(tmp_path / "a|b"), "-o", str(tmp_path / "new" / "report.html")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.csv", "report.html", "report.md"]


def test_no_text_of_a_run_leaves_its_place_in_the_page(tmp_path):
    text = "</script><script>alert(1)</script><!-- \ud800"
    run = make_run(tmp_path / "<i>run", line(1, 4.0))
    make_run(run, json.dumps({"step": 1, "prompt": text, "text": text}) + "\n", name="samples.jsonl")
    made = page(make_report([read(run)]))
    assert "alert(1)</script>" not in made and "<i>run" not in made
    assert made.encode().count(b"</script>") == 3
    inside = made.split('id="data">')[1].split("</script>")[0]
    assert json.loads(inside)["runs"][0]["samples"][0]["text"] == text.replace("\ud800", "\ufffd")


REFUSED = {
    "missing": (["{0}/missing"], r"missing\) is not a folder"),
    "a file": (["{0}/good/metrics.jsonl"], r"is not a folder"),
    "no metrics": (["{0}/bare"], r"bare\) has no metrics.jsonl, and no logs/metrics.jsonl"),
    "empty": (["{0}/empty"], r"empty: metrics.jsonl has no line yet.*--watch"),
    "half a line": (["{0}/half"], r"half: metrics.jsonl has no line yet"),
    "binary": (["{0}/binary"], r"holds no metrics: none of its lines"),
    "variable": (["$NO_SUCH_VARIABLE/x"], r"NO_SUCH_VARIABLE is not set"),
    "all at once": (["{0}/missing", "{0}/good", "{0}/bare"], r"(?s)missing.*bare"),
    "no page": (["{0}/good", "-o", "{0}/report.md"], r"report.md\) must end in .html"),
    "a folder there": (["{0}/good", "-o", "{0}/folder.html"], r"folder.html is a folder"),
    "somebody's page": (["{0}/good", "-o", "{0}/mine.html"], r"mine.html is there and is no report"),
    "somebody's figures": (["{0}/good", "-o", "{0}/good/metrics.html"], r"metrics.csv is there and is no report"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_reported_is_refused_before_anything_is_written(tmp_path, case):
    make_run(tmp_path / "good", line(1, 4.0))
    make_run(tmp_path / "empty")
    make_run(tmp_path / "half", line(1, 4.0)[:-1])
    (tmp_path / "bare").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "mine.html").write_text("<!doctype html><p>mine")
    (tmp_path / "good" / "metrics.csv").write_text("step,loss\n1,4\n")
    make_run(tmp_path / "binary")
    (tmp_path / "binary" / "metrics.jsonl").write_bytes(bytes(range(256)) * 40 + b"\n")
    words, message = REFUSED[case]
    before = sorted(tmp_path.rglob("*"))
    flags = [] if "-o" in words else ["-o", str(tmp_path / "report.html")]
    with pytest.raises(UserError, match=message):
        report_command([word.format(tmp_path) for word in words] + flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_runs_without_torch(tmp_path):
    blocked = "import sys; sys.modules['torch'] = None; from megatron.report.command import main; sys.exit(main())"
    words = [sys.executable, "-c", blocked, str(make_run(tmp_path, line(1, 4.0))), "-o", str(tmp_path / "report.html")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "report.html (0.1 MB)" in done.stdout
    done = subprocess.run([*words[:3], str(tmp_path / "none")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "none) is not a folder" in done.stderr and "Traceback" not in done.stderr


def test_the_charts_are_the_published_ones():
    folder = Path(tables.__file__).parent / "page" / "uplot"
    digest = hashlib.sha256((folder / "uPlot.iife.min.js").read_bytes()).hexdigest()
    assert digest == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f", "uPlot 1.6.32 from npm"
    assert "MIT License" in (folder / "LICENSE").read_text()


# the server


@pytest.fixture
def served(tmp_path):
    """Asks a server of the run in tmp_path: (path, headers) -> status, headers, body."""
    server = make_server([RunFolder(make_run(tmp_path))], 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()

    assert server.server_address[0] == "127.0.0.1"
    yield ask
    server.shutdown()
    server.server_close()


def test_the_server_tells_what_is_new_and_nothing_twice(tmp_path, served):
    assert b"const LIVE = true" in served("/")[2]
    status, headers, body = served("/data")
    assert status == 200 and json.loads(body)["runs"][0]["notes"], "no step has been logged yet"
    assert served("/data", If_None_Match=headers["ETag"])[0] == 304
    make_run(tmp_path, line(1, 4.0))
    status, headers, body = served("/data", If_None_Match=headers["ETag"])
    assert status == 200 and json.loads(body)["runs"][0]["curves"]["train/lm_loss"]["values"] == [4.0]
    (tmp_path / "metrics.jsonl").unlink()
    status, _, body = served("/data", If_None_Match=headers["ETag"])
    assert status == 503 and b"metrics.jsonl cannot be read" in body


def test_the_server_answers_browsers_of_its_machine_alone(served):
    assert served("/", Host="evil.example")[0] == 403
    assert served("/", Host="127.0.0.1.evil.example:80")[0] == 403
    assert served("/", Host="localhost:8008")[0] == 200
    assert served("/../../etc/passwd")[0] == 404


def test_a_port_that_is_taken_is_named(tmp_path):
    folders = [RunFolder(make_run(tmp_path))]
    with make_server(folders, 0) as server, pytest.raises(UserError, match="--port 0 takes a free one"):
        make_server(folders, server.server_address[1])
