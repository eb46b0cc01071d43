"""A report as one page, as Markdown, and as CSV."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson

from megatron.events import Event
from megatron.report import tables
from megatron.report.metrics_file import Numbers, Series
from megatron.report.run_folder import TRAIN_LOSS, VALIDATION_LOSS, RunRecord, Sample
from megatron.report.tables import Table
from megatron.report.thinning import Thinned, thinned
from megatron.text import well_formed

_PAGE = Path(__file__).parent / "page"
_CURVES = 1_600_000  # bytes of all curves; samples, tables and the page itself have the rest of 3 MB
_POINT = 18  # bytes of a step and a value
_TEXTS = 120_000  # characters of each kind of text, such as samples and events, over all runs
_STRETCHES = (1000, 500, 250, 125, 60, 30, 15)  # of a curve: the first number of them that has room
_POINTS = 3000  # of all axes, and of all curves that were set aside
_NAMES = 50  # of metrics that are left out
_SKIPS = ("train/skipped_steps", "train/skipped_updates")
_MAIN = (TRAIN_LOSS, VALIDATION_LOSS, "train/grad_norm", "train/learning_rate", "runtime/tokens_per_sec")


@dataclass(frozen=True)
class Report:
    """Runs, and what is drawn of them: the curves of each run by name; left_out are names without a curve."""

    runs: list[RunRecord]
    curves: list[dict[str, Thinned]]
    left_out: list[str]


def make_report(runs: Sequence[RunRecord]) -> Report:
    """Thin all metrics, so that the page stays below 3 MB, however many and long they are."""
    drawn = {
        name
        for run in runs
        for name, series in run.metrics.items()
        if name not in _SKIPS or (series.values > 0).any()  # which most runs never have
    }
    names = sorted(drawn, key=lambda name: (name not in _MAIN, name))
    most = max(1, _CURVES // (_POINT * 4 * _STRETCHES[-1] * len(runs)))
    names, left_out = names[:most], names[most:]
    lengths = [len(run.metrics[name].steps) for run in runs for name in names if name in run.metrics]
    stretches = next(
        (count for count in _STRETCHES if _POINT * sum(min(length, 4 * count) for length in lengths) <= _CURVES),
        _STRETCHES[-1],
    )
    curves = [{name: thinned(run.metrics[name], stretches) for name in names if name in run.metrics} for run in runs]
    return Report(_told_apart(runs), curves, left_out)


def _told_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """`runs`; where names repeat, they begin with what differs between the folders."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return list(runs)
    folders = [str(run.folder.resolve()) for run in runs]
    if len(set(folders)) < len(folders):
        return [replace(run, name=f"{run.name} ({number})") for number, run in enumerate(runs, 1)]
    above = os.path.commonpath(folders)
    return [replace(run, name=os.path.relpath(folder, above)) for run, folder in zip(runs, folders, strict=True)]


def page(report: Report, live: bool = False) -> str:
    """The page: one file that needs no other. live: it asks its server for news."""
    parts = {
        "TITLE": escape(", ".join(run.name for run in report.runs)),
        "STYLE": _asset("uplot/uPlot.min.css") + _asset("page.css"),
        "LICENCE": _asset("uplot/LICENSE"),
        "CHARTS": _asset("uplot/uPlot.iife.min.js"),
        "SCRIPT": _asset("page.js"),
        "LIVE": "true" if live else "false",
        "DATA": data(report).decode().replace("<", "\\u003c"),  # so no text of a run can end the element
    }
    pieces = _asset("page.html").split("@@")
    return well_formed("".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces)))


def _asset(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def data(report: Report) -> bytes:
    """What the page shows, as JSON."""
    runs = [_run_data(run, curves, len(report.runs)) for run, curves in zip(report.runs, report.curves, strict=True)]
    whole = {
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "runs": runs,
        "overview": tables.overview(report.runs),
        "difference": tables.difference(report.runs, _TEXTS),
        "left_out": [*report.left_out[:_NAMES], *(["..."] if len(report.left_out) > _NAMES else [])],
        "left_out_count": len(report.left_out),
    }
    return orjson.dumps(_well_formed(whole), option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _well_formed(value: Any) -> Any:
    """`value` with texts that UTF-8 can hold."""
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, dict):
        return {_well_formed(key): _well_formed(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_well_formed(part) for part in value]
    if isinstance(value, Table):
        return _well_formed({"header": value.header, "rows": value.rows, "note": value.note})
    return value


def _run_data(run: RunRecord, curves: dict[str, Thinned], runs: int) -> dict[str, Any]:
    """runs: how many share the room of the page."""
    room, points = _TEXTS // runs, _POINTS // runs
    shown = np.unique(np.linspace(0, max(0, len(run.steps) - 1), min(1000, points)).astype(int))[: len(run.steps)]
    aside = run.set_aside[-20:]
    axes = {"steps": run.steps[shown]}
    for name, values in (("tokens", run.tokens), ("seconds", run.seconds)):
        if values is not None and len(values) and np.isfinite(values).all():
            axes[name] = values[shown]
    texts = _shortened(run.samples, room)
    return {
        "name": run.name,
        "folder": str(run.folder.resolve()),
        "rows": len(run.steps),
        "thinned": any(curve.means is not None for curve in curves.values()),
        "notes": run.notes,
        "axes": axes,
        "curves": {name: _curve(curve) for name, curve in curves.items()},
        "aside": [_points(thinned(series, max(2, points // (4 * len(aside)))).kept) for series in aside],
        "marks": _marks(run, room),
        "events": tables.events(run, room),
        "evaluations": tables.evaluations(run, room),
        "samples": [{"step": one.step, "prompt": one.prompt, "text": one.text} for one in texts],
        "samples_left_out": len(run.samples) - len(texts),
        "starts": tables.starts(run, room),
        "configuration": tables.configuration(run, room) if run.config else None,
        "config_files": {
            name: _cut(text, room // max(1, len(run.config_files))) for name, text in run.config_files.items()
        },
    }


def _curve(curve: Thinned) -> dict[str, Any]:
    means = {} if curve.means is None else {"means": _points(curve.means)}
    return _points(curve.kept) | means


def _points(series: Series) -> dict[str, Any]:
    with np.errstate(over="ignore"):
        return {"steps": series.steps, "values": series.values.astype(np.float32)}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def _shortened(samples: Sequence[Sample], room: int) -> list[Sample]:
    """Samples of as many steps as have room, evenly spaced and always of the last step; very long ones are cut."""
    longest = min(4000, room // 8)
    samples = [Sample(one.step, _cut(one.prompt, longest // 2), _cut(one.text, longest)) for one in samples]
    steps = sorted({one.step for one in samples})
    while len(steps) > 1 and sum(len(one.prompt) + len(one.text) for one in samples) > room:
        steps = steps[::-1][::2][::-1]
        samples = [one for one in samples if one.step in set(steps)]
    return samples


def _marks(run: RunRecord, room: int) -> list[dict[str, Any]]:
    """Events that have a place on the axis of steps: their own, or that of the event before."""
    placed: list[tuple[int, Event]] = []
    step = 0
    for event in run.events:
        step = step if event.step is None else event.step
        placed.append((step, event))
    told = {step for step, event in placed if event.kind == "not_finite"}
    # Those of `skip_update` are events.
    skipped = run.metrics.get("train/skipped_steps", Series(np.empty(0, np.int64), np.empty(0)))
    for step, count in zip(skipped.steps.tolist(), skipped.values.tolist(), strict=True):
        if count > 0 and step not in told:
            text = f"{count:.0f} update{'s' if count > 1 else ''} skipped"
            placed.append((step, Event("skipped_update", text, step)))
    order = sorted(range(len(placed)), key=lambda place: (placed[place][1].kind in tables.ROUTINE, -place))
    return [
        {"step": placed[place][0], "kind": placed[place][1].kind, "text": _cut(placed[place][1].text, 200)}
        for place in sorted(order[: room // 120])
    ]


def markdown(report: Report) -> str:
    """The tables of the report, for terminals, issues and mail."""
    parts = [f"# Deepy report: {tables.plain(', '.join(run.name for run in report.runs))}"]
    parts.append(tables.overview(report.runs).markdown())
    difference = tables.difference(report.runs)
    if difference is not None:
        parts += ["## Differences of the configurations", difference.markdown()]
    for run in report.runs:
        parts.append(f"## {tables.plain(run.name)}")
        parts += [f"- {tables.plain(note)}" for note in run.notes]
        for title, table in (
            ("Starts", tables.starts(run)),
            ("Evaluations", tables.evaluations(run)),
            ("Events", tables.events(run) if run.events else None),
            ("Configuration", tables.configuration(run) if run.config else None),
        ):
            if table is not None:
                parts += [f"### {title}", table.markdown()]
        if run.samples:
            last = run.samples[-1].step
            parts.append(f"### Samples at step {last:,}")
            parts += [tables.quoted(one.prompt + one.text) for one in run.samples if one.step == last]
    return well_formed("\n\n".join(parts) + "\n")


def write_csv(report: Report, file: IO[str]) -> None:
    """A row for each step that has a point in some curve, with all metrics of that step; empty where there is none."""
    names = sorted({name for curves in report.curves for name in curves})
    writer = csv.writer(file)
    writer.writerow(["run", "step", "tokens", "seconds", *names])
    for run, curves in zip(report.runs, report.curves, strict=True):
        steps = np.unique(np.concatenate([np.empty(0, np.int64), *(curve.kept.steps for curve in curves.values())]))
        places = np.searchsorted(run.steps, steps)
        empty = np.full(len(steps), np.nan)
        columns = [empty if values is None else values[places] for values in (run.tokens, run.seconds)]
        columns += [_values_at(run.metrics[name], steps) if name in run.metrics else empty for name in names]
        name = well_formed(run.name)
        for step, *values in zip(steps.tolist(), *(column.tolist() for column in columns), strict=True):
            writer.writerow([name, step, *("" if value != value else f"{value:.10g}" for value in values)])


def _values_at(series: Series, steps: np.ndarray) -> Numbers:
    """The values of `series` at `steps`, NaN where it has none."""
    places = np.minimum(np.searchsorted(series.steps, steps), len(series.steps) - 1)
    return np.where(series.steps[places] == steps, series.values[places], np.nan)
