"""Everything that the log folder of one run says about it."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.errors import UserError
from megatron.events import EVENTS_FILE, Event, read_events
from megatron.files import is_file, is_folder
from megatron.record.secrets import values_without_secrets
from megatron.record.start import STARTS, Start, read_starts
from megatron.report.metrics_file import MetricsFile, Numbers, Series, Steps

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
TRAIN_LOSS, VALIDATION_LOSS = "train/lm_loss", "validation/lm_loss"
_LAYOUT = {"pipe": "pipeline", "data": "data", "context": "context", "model": "tensor", "zero_stage": "ZeRO"}


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote during the training."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell it. Nothing in it is trusted: texts may hold anything.

    steps: with metrics, ascending [n]. tokens, seconds: trained until each of them, None if the files do not tell; the
    seconds are those of training, without validation, saving and interruptions. set_aside: the training loss of steps
    that were trained again, a series for each time. starts: as recorded, the first and each resume. config:
    flat keys. config_files: the text of each as given. notes: what is wrong with the files, for people.
    """

    name: str
    folder: Path
    steps: Steps
    metrics: dict[str, Series]
    tokens: Numbers | None = None
    seconds: Numbers | None = None
    set_aside: list[Series] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_files: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class RunFolder:
    """The log folder of a run. `read` may be called again while the run goes on, and then reads new metrics only."""

    def __init__(self, path: Path) -> None:
        """path: a log folder, or the folder of checkpoints around one. Raises UserError for anything else."""
        self.path = _log_folder(path)
        self.name = _name_of(self.path)
        self._metrics = MetricsFile(self.path / METRICS_FILE)
        self._aside: dict[Path, MetricsFile] = {}

    def read(self) -> RunRecord:
        """What the files say now. Raises UserError if the metrics cannot be read or are no metrics at all."""
        path = self.path / METRICS_FILE
        try:
            self._metrics.update()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if self._metrics.damaged and not len(self._metrics):
            raise UserError(f'{path} holds no metrics: none of its lines is a JSON object with "step"')
        steps, metrics, gone = self._metrics.split()
        starts = read_starts(self.path)
        events = _events(self.path, starts)
        config, files = _configuration(self.path, starts)
        first = _steps_before(steps, starts)
        return RunRecord(
            name=self.name,
            folder=self.path,
            steps=steps,
            metrics=metrics,
            tokens=_tokens(steps, metrics, first),
            seconds=_seconds(steps, metrics, first),
            set_aside=self._set_aside(metrics, gone),
            events=events,
            starts=starts,
            config=config,
            config_files=files,
            samples=_samples(self.path, events),
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        damaged = self._metrics.damaged
        notes = [] if len(self._metrics) else [f"{METRICS_FILE} has no line yet: no step has been logged"]
        if damaged:
            notes.append(f"{damaged} damaged line{'s' if damaged > 1 else ''} of {METRICS_FILE} left out")
        if self._metrics.is_cut:
            notes.append(f"the last line of {METRICS_FILE} has no end and is left out")
        return notes

    def _set_aside(self, metrics: dict[str, Series], gone: dict[str, Series]) -> list[Series]:
        """Losses of steps that were trained again: lines before a step back, and files of earlier attempts."""
        valid = metrics.get(TRAIN_LOSS, Series(np.empty(0, np.int64), np.empty(0)))
        found = list(_ascending_parts(gone[TRAIN_LOSS])) if TRAIN_LOSS in gone else []
        for path in sorted(self.path.glob("metrics.*.jsonl"), key=_number_of):
            file = self._aside.setdefault(path, MetricsFile(path))
            try:
                file.update()
            except OSError as error:
                log.warning("%s is left out: %s", path, error.strerror)
                continue
            for series in file.split()[1:]:
                if TRAIN_LOSS in series:
                    found += _ascending_parts(_without(series[TRAIN_LOSS], valid))
        return found


def _log_folder(path: Path) -> Path:
    if not is_folder(path):
        raise UserError(f"RUN ({path}) is not a folder; give the log folder of a run, in which {METRICS_FILE} lies")
    for folder in (path, path / "logs"):
        if is_file(folder / METRICS_FILE):
            return folder
    raise UserError(f"RUN ({path}) has no {METRICS_FILE}, and no logs/{METRICS_FILE}; give the log folder of a run")


def _name_of(folder: Path) -> str:
    absolute = folder.resolve()
    return absolute.parent.name if absolute.name == "logs" and absolute.parent.name else absolute.name or str(absolute)


def _number_of(path: Path) -> tuple[int, str]:
    number = re.search(r"\d+", path.name)
    return int(number.group()) if number else 0, path.name


def _without(series: Series, other: Series) -> Series:
    """The points of `series` that `other` does not have."""
    if not len(other.steps):
        return series
    places = np.minimum(np.searchsorted(other.steps, series.steps), len(other.steps) - 1)
    same = (other.steps[places] == series.steps) & (
        (other.values[places] == series.values) | (np.isnan(other.values[places]) & np.isnan(series.values))
    )
    return Series(series.steps[~same], series.values[~same])


def _ascending_parts(series: Series) -> Iterator[Series]:
    """`series` cut where its steps go back."""
    cuts = np.flatnonzero(np.diff(series.steps) <= 0) + 1
    for steps, values in zip(np.split(series.steps, cuts), np.split(series.values, cuts), strict=True):
        if len(steps):
            yield Series(steps, values)


def _at_steps(steps: Steps, series: Series) -> Numbers:
    """The values at `steps`; where there is none, the next one, or else the one before."""
    numbers = ~np.isnan(series.values)
    known, values = series.steps[numbers], series.values[numbers]
    if not len(known):
        return np.full(len(steps), np.nan)
    found: Numbers = values[np.minimum(np.searchsorted(known, steps), len(known) - 1)]
    return found


def _steps_before(steps: Steps, starts: Sequence[Start]) -> int:
    """The steps that were done before the first of `steps` and are not recorded here, as after a resume elsewhere."""
    return min((start.step for start in starts if len(steps) and start.step < steps[0]), default=0)


def _tokens(steps: Steps, metrics: dict[str, Series], before: int) -> Numbers | None:
    """Tokens trained until each step: as recorded, or else those of a step follow from its time and its rate.

    before: steps done before the first.
    """
    recorded = metrics.get("train/tokens")
    if recorded is not None and not np.isnan(recorded.values).any():
        tokens: Numbers = np.interp(steps, np.append(0, recorded.steps), np.append(0.0, recorded.values))
        return tokens
    seconds, rate = metrics.get("runtime/iteration_time"), metrics.get("runtime/tokens_per_sec")
    if seconds is None or rate is None:
        return None
    each = np.round(_at_steps(steps, seconds) * _at_steps(steps, rate))
    return np.cumsum(each * np.diff(steps, prepend=before))


def _seconds(steps: Steps, metrics: dict[str, Series], before: int) -> Numbers | None:
    each = metrics.get("runtime/iteration_time")
    return None if each is None else np.cumsum(_at_steps(steps, each) * np.diff(steps, prepend=before))


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in the lines of a file; nothing for other lines, or if there is no such file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _configuration(folder: Path, starts: Sequence[Start]) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of the last start, and its files as given; else that of the newest checkpoint around."""
    for start in reversed(starts):
        if isinstance(config := start.facts.get("config"), dict):
            paths = sorted((start.folder / "config").glob("*"))
            return config, {path.name: text for path in paths if (text := _text(path)) is not None}
    checkpoints = sorted(folder.parent.glob("global_step*/config.json"), key=_step_of_checkpoint)
    found = _object(checkpoints[-1]) if checkpoints and folder.name == "logs" else {}
    return values_without_secrets(found), {}


def _step_of_checkpoint(path: Path) -> int:
    digits = re.sub(r"\D", "", path.parent.name)
    return int(digits) if digits else -1


def _events(folder: Path, starts: Sequence[Start]) -> list[Event]:
    """The events, with types as promised; those of resumes say whether the layout has changed."""
    events = [
        Event(event.kind, str(event.text), _whole(event.step), _number(event.time), event.details)
        for event in read_events(folder)
    ]
    return [_with_layout(event, starts) if event.kind == "resume" else event for event in events]


def _with_layout(event: Event, starts: Sequence[Start]) -> Event:
    """`event`, a resume, with the change of the layout in its text, if the record of the starts shows one."""
    away = {number: abs(_number(start.facts.get("time")) - event.time) for number, start in enumerate(starts)}
    nearest = min(away, key=away.__getitem__, default=0)
    if nearest == 0 or away[nearest] > 60:
        return event
    before, after = (starts[number].facts.get("layout") for number in (nearest - 1, nearest))
    if not isinstance(before, dict) or not isinstance(after, dict):
        return event
    changes = [
        f"{name} {before.get(key)} → {after.get(key)}"
        for key, name in _LAYOUT.items()
        if before.get(key) != after.get(key)
    ]
    text = f"{event.text}; on another layout: {', '.join(changes)}" if changes else event.text
    return Event(event.kind, text, event.step, event.time, event.details)


def _samples(folder: Path, events: Sequence[Event]) -> list[Sample]:
    """Of each step, prompt and number of its text the last, in order; none of steps that the run went back from."""
    backs = [(event.time, _step_after(event)) for event in events if event.kind in ("rewind", "resume")]
    found = {}
    for row in _json_lines(folder / SAMPLES_FILE):
        step, text, time = _whole(row.get("step")), row.get("text"), _number(row.get("time"))
        if step is None or not isinstance(text, str):
            continue
        if not any(0 < time < when and step > back for when, back in backs):
            found[step, _whole(row.get("number")) or 0, _whole(row.get("sample")) or 0] = Sample(
                step, str(row.get("prompt", "")), text
            )
    return [found[place] for place in sorted(found)]


def _step_after(event: Event) -> int:
    """The step from which a run went on at a rewind or a resume."""
    step = _whole(event.details.get("to_step")) if event.kind == "rewind" else event.step
    return 0 if step is None else step


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else 0.0


def modified(folder: Path) -> object:
    """Changes when a file that a report is made from does."""
    paths = [folder / name for name in (METRICS_FILE, EVENTS_FILE, SAMPLES_FILE, STARTS)]
    found = [path.stat() if path.exists() else None for path in paths]
    return [status and (status.st_ino, status.st_mtime_ns, status.st_size) for status in found]
