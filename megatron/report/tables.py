"""The tables of a report: what they say, and as Markdown."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from megatron.record.start import Start
from megatron.report.metrics_file import Series
from megatron.report.run_folder import TRAIN_LOSS, VALIDATION_LOSS, RunRecord
from megatron.units import duration, short_number

ROUTINE = frozenset({"checkpoint", "validation", "evaluation", "samples", "writer"})
COUNTED = ("resume", "restart", "spike", "rewind", "not_finite", "skipped_update", "straggler", "hang", "failure")
_MOST_ROWS = 300


@dataclass(frozen=True)
class Table:
    """Texts in columns. note: a sentence below, such as what was left out."""

    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """As Markdown. Cells may hold anything: what would end a cell or begin markup is escaped."""
        head, *rows = ([plain(cell) for cell in row] for row in (self.header, *self.rows))
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] if rows else []
        return "\n".join(lines + (["", self.note] if self.note else []))


def plain(text: str) -> str:
    """`text` in one line, and so that Markdown shows it as it is."""
    return " ".join(re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", text).split())


def quoted(text: str) -> str:
    """`text` as a block of Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def overview(runs: Sequence[RunRecord]) -> Table:
    """One row per run: how far it is and how well it does. Columns that no run has a value for are left out."""
    rows = [_overview_row(run) for run in runs]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    return Table(columns, [[row[name] for name in columns] for row in rows])


def _overview_row(run: RunRecord) -> dict[str, str]:
    start: Mapping[str, Any] = run.starts[-1].facts if run.starts else {}
    parameters = start.get("parameters")
    memory = [series for name, series in run.metrics.items() if "memory" in name or "_mem" in name]
    return {
        "run": run.name,
        "steps": f"{run.steps[-1]:,}" if len(run.steps) else "0",
        "tokens": "" if run.tokens is None or not len(run.tokens) else _count(run.tokens[-1]),
        "training time": "" if run.seconds is None or not len(run.seconds) else _time(run.seconds[-1]),
        "training loss": _figure(_last(run, TRAIN_LOSS)),
        "validation loss": _figure(_last(run, VALIDATION_LOSS)),
        "best validation loss": _best(run),
        "tokens/s (median)": _count(_median(run, "runtime/tokens_per_sec")),
        "MFU (median)": _share(_median(run, "runtime/model_flops_utilization")),
        "memory (peak)": _bytes(
            max((float(np.nanmax(one.values)) for one in memory if _has_number(one)), default=None)
        ),
        "parameters": _count(parameters if isinstance(parameters, int) else None),
        "layout": _layout(start.get("layout")),
        "what happened": _counted(Counter(event.kind for event in run.events)),
    }


def _has_number(series: Series) -> bool:
    return not np.isnan(series.values).all()


def _last(run: RunRecord, name: str) -> float | None:
    series = run.metrics.get(name)
    return float(series.values[-1]) if series is not None and len(series.values) else None


def _median(run: RunRecord, name: str) -> float | None:
    series = run.metrics.get(name)
    return float(np.nanmedian(series.values)) if series is not None and _has_number(series) else None


def _best(run: RunRecord) -> str:
    series = run.metrics.get(VALIDATION_LOSS)
    if series is None or not _has_number(series):
        return ""
    place = int(np.nanargmin(series.values))
    return f"{_figure(float(series.values[place]))} at step {series.steps[place]:,}"


def _figure(value: float | None) -> str:
    return "" if value is None else "not finite" if math.isnan(value) else f"{value:.4g}"


def _count(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return short_number(int(value) if value == int(value) else value)


def _time(seconds: float) -> str:
    return "" if math.isnan(seconds) else duration(seconds)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _bytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**30:.2f} GiB" if value >= 1e6 else f"{value:.4g}"


def _layout(layout: object) -> str:
    if not isinstance(layout, dict):
        return ""
    axes = [f"{name} {layout[name]}" for name in ("pipe", "data", "context", "model") if layout.get(name, 1) != 1]
    zero = [f"ZeRO {layout['zero_stage']}"] if layout.get("zero_stage") else []
    return ", ".join([*axes, *zero]) or "one rank"


def _counted(kinds: Counter[Any]) -> str:
    counts = ((kinds[kind], kind.replace("_", " ")) for kind in COUNTED if kinds[kind])
    return ", ".join(f"{count} {name}{'s' if count > 1 and name != 'not finite' else ''}" for count, name in counts)


def events(run: RunRecord, room: int = 1_000_000) -> Table:
    """What happened in a run, the newest last. Of very many, the newest and those beside the routine are shown.

    room: characters of all texts.
    """
    most = min(_MOST_ROWS, max(10, room // 200))
    order = sorted(range(len(run.events)), key=lambda place: (run.events[place].kind in ROUTINE, -place))
    shown = sorted(order[:most])
    rows = [
        [
            "" if event.step is None else f"{event.step:,}",
            _clock(event.time),
            event.kind.replace("_", " "),
            _cut(event.text, max(100, room // most)),
        ]
        for event in (run.events[place] for place in shown)
    ]
    left = len(run.events) - len(rows)
    return Table(
        ["step", "time (UTC)", "event", "text"],
        rows,
        f"{left:,} of {len(run.events):,} events are not shown." if left else "",
    )


def _clock(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}" if seconds else ""
    except (OverflowError, ValueError, OSError):
        return ""


def evaluations(run: RunRecord, room: int = 1_000_000) -> Table | None:
    """Validation losses and scores of tasks, a row for each step that has some; None without any.

    room: characters of all rows; of too many rows the best and evenly spaced ones are shown.
    """
    names = [name for name in run.metrics if name.startswith(("validation/", "tasks/", "evaluation/"))]
    if not names:
        return None
    steps = np.unique(np.concatenate([run.metrics[name].steps for name in names]))
    most = min(_MOST_ROWS, max(2, room // (10 * (len(names) + 2))))
    best = run.metrics.get(VALIDATION_LOSS)
    kept = {int(steps[place]) for place in np.unique(np.linspace(0, len(steps) - 1, most).astype(int))}
    if best is not None and _has_number(best):
        kept.add(int(best.steps[np.nanargmin(best.values)]))
    saved = {event.step for event in run.events if event.kind == "checkpoint"}
    values = {
        name: dict(zip(run.metrics[name].steps.tolist(), run.metrics[name].values.tolist(), strict=True))
        for name in names
    }
    rows = [
        [f"{step:,}", "yes" if step in saved else "", *(_figure(values[name].get(step)) for name in names)]
        for step in sorted(kept)
    ]
    left = len(steps) - len(rows)
    return Table(["step", "saved", *names], rows, f"{left:,} rows in between are not shown." if left else "")


def difference(runs: Sequence[RunRecord], room: int = 1_000_000) -> Table | None:
    """Keys of the configurations that differ; None if there are not two configurations to compare.

    room: characters of all values.
    """
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return None
    flat = [dict(_flat(run.config)) for run in known]
    defaults = _defaults()
    differing: dict[str, list[str]] = {}
    for key in sorted({key for one in flat for key in one}):
        values = [one.get(key, defaults.get(key)) for one in flat]
        if any(value != values[0] for value in values):
            told = ["" if key in one else " (default)" for one in flat]
            differing[key] = [_value(value) + default for value, default in zip(values, told, strict=True)]
    longest = max(12, room // max(1, len(differing) * len(known)))
    rows = [[key, *(_cut(value, longest) for value in values)] for key, values in differing.items()]
    return Table(["key", *(run.name for run in known)], rows, "" if rows else "The configurations are the same.")


def configuration(run: RunRecord, room: int = 1_000_000) -> Table:
    """All keys of a run's configuration. room: characters of all values."""
    rows = [[key, _value(value)] for key, value in _flat(run.config)]
    return Table(["key", "value"], [[key, _cut(value, room // len(rows))] for key, value in rows])


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def _flat(config: object, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Keys of groups inside each other, joined by dots."""
    for key, value in config.items() if isinstance(config, dict) else []:
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _defaults() -> dict[str, Any]:
    from megatron.config.schema.config import group_fields  # takes longer than all the rest, and is seldom needed

    fields = {key: kind for group in group_fields().values() for key, kind in group.model_fields.items()}
    plain = {
        key: kind.get_default(call_default_factory=False) for key, kind in fields.items() if not kind.is_required()
    }
    dumped = {
        key: value.model_dump(mode="json") if hasattr(value, "model_dump") else value for key, value in plain.items()
    }
    return {key: list(value) if isinstance(value, tuple | frozenset) else value for key, value in _flat(dumped)}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else "not set" if value is None else json.dumps(value, ensure_ascii=False)


def starts(run: RunRecord, room: int = 1_000_000) -> Table | None:
    """When, where and on what the run was started; None for a run without such a record.

    room: characters of all rows; of too many the last are shown.
    """
    if not run.starts:
        return None
    shown = run.starts[-min(_MOST_ROWS, max(2, room // 500)) :]
    rows = [[_cut(cell, 250) for cell in _start_row(start)] for start in shown]
    left = len(run.starts) - len(shown)
    header = ["from step", "time (UTC)", "layout", "hosts", "commit", "torch", "command"]
    return Table(header, rows, f"{left:,} earlier starts are not shown." if left else "")


def _start_row(start: Start) -> list[str]:
    """Facts of a start; any of them may be missing."""
    facts = start.facts
    code, versions, hosts, command = (facts.get(name) for name in ("code", "versions", "hosts", "command"))
    commit = ""
    if isinstance(code, dict):
        changed = code.get("changed_files")
        commit = str(code.get("commit") or "")[:10] + (f" and {changed} changed files" if changed else "")
    return [
        f"{start.step:,}",
        _clock(facts["time"]) if isinstance(facts.get("time"), int | float) else "",
        _layout(facts.get("layout")),
        ", ".join(map(str, hosts)) if isinstance(hosts, list) else "",
        commit,
        str(versions.get("torch") or "") if isinstance(versions, dict) else "",
        " ".join(map(str, command)) if isinstance(command, list) else "",
    ]
