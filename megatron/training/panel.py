"""The state of a run in a few lines, for the bottom of a terminal.

Everything shown is known on the host already: the figures of the last log line, and times that the host has measured.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest

from rich.text import Text

from megatron.engine.phases import PHASES
from megatron.events import Event
from megatron.progress import bar
from megatron.training.liveness import Liveness
from megatron.units import duration, short_number

LABEL_COLUMNS = 12
# Of the state, where there is room for the events beside it; below that they follow it.
STATE_COLUMNS, EVENT_COLUMNS = 88, 40
EVENTS_BELOW, EVENTS_KEPT = 3, 20
STEPS_TIMED = 1000  # whose mean is the time left; a shorter mean would jump at each validation
RECENT_STEPS = 20  # whose mean is the speed
SPARKS = "▁▂▃▄▅▆▇█"
# What the host does in a step, besides waiting for data, counts as the step: reading the loss waits for its kernels.
OF_THE_STEP = ("training step", "after the step")
BAD = ("failure", "spike", "rewind", "skipped_update", "not_finite", "restart", "hang", "straggler", "replicas_differ")
OWN_LINE = ("checkpoint", "validation", "start")  # events that the panel shows elsewhere


class Trend:
    """The course of a figure over a whole run, in a bounded number of means over equally many values."""

    def __init__(self, most: int = 256) -> None:
        """most: an even number of means, of which neighbours are merged when there are so many."""
        self._most, self._means = most, list[float]()
        self._size, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """The next value."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._size:
            self._means.append(self._sum / self._size)
            self._sum, self._count = 0.0, 0
        if len(self._means) == self._most:
            self._means = [sum(self._means[at : at + 2]) / 2 for at in range(0, self._most, 2)]
            self._size *= 2

    @property
    def means(self) -> list[float]:
        """Oldest first; the last one may be of fewer values."""
        return [*self._means, self._sum / self._count] if self._count else list(self._means)


class Panel:
    """What is known of a run. It is told by the training's thread, and drawn by another."""

    def __init__(
        self,
        first_step: int,
        last_step: int,
        liveness: Liveness,
        memory: Callable[[], str],
        compiles: bool = False,
        on_gpu: bool = False,
        peak_name: str = "",
    ) -> None:
        """first_step: done before this run. last_step: done at its end. memory: a line about it, asked once a second.

        compiles: the first step compiles the model. peak_name: of what MFU is a share, if not of the device's peak.
        """
        self._step = self._first = first_step
        self._last, self._liveness = last_step, liveness
        self._memory, self._compiles, self._on_gpu, self._peak_name = memory, compiles, on_gpu, peak_name
        self._lock = threading.Lock()
        self._finished: deque[float] = deque(maxlen=STEPS_TIMED + 1)
        self._before: dict[str, float] = {}  # seconds by phase when the first step was done
        self._metrics: dict[str, float] = {}
        self._logged = first_step
        self._losses = Trend()
        self._validation: tuple[float, int, float] | None = None  # loss, step, time
        self._checkpoint: Event | None = None
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._asked, self._said = 0.0, ""  # when `memory` was last asked, and what it said

    def finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done, of which `metrics` are recorded; most steps have none."""
        with self._lock:
            self._step = step
            self._finished.append(time.monotonic())
            if len(self._finished) == 1:
                self._before = dict(self._liveness.seconds)
            if "validation/lm_loss" in metrics:
                self._validation = metrics["validation/lm_loss"], step, time.time()
            if "train/lm_loss" in metrics:
                self._metrics, self._logged = dict(metrics), step
                self._losses.add(metrics["train/lm_loss"])

    def rewound(self, step: int) -> None:
        """The training has gone back to `step`."""
        with self._lock:
            self._step = self._logged = step
            self._finished.clear()

    def note(self, event: Event) -> None:
        """Something happened."""
        with self._lock:
            if event.kind == "checkpoint":
                self._checkpoint = event
            if event.kind not in OWN_LINE:
                self._events.append(event)

    def lines(self, columns: int) -> list[Text]:
        """The panel, below an empty line."""
        with self._lock:
            events = [told(event) for event in self._events]
            beside = bool(events) and columns >= STATE_COLUMNS + EVENT_COLUMNS
            header, state = self._header(columns), self._state(STATE_COLUMNS if beside else columns)
            if beside:
                column = [Text("events", "dim"), *events[1 - len(state) :]]
                return [Text(), header, *(side_by_side(*pair) for pair in zip_longest(state, column))]
            below = (row("" if number else "events", [line]) for number, line in enumerate(events[-EVENTS_BELOW:]))
            return [Text(), header, *state, *below]

    def _state(self, columns: int) -> list[Text]:
        lines = []
        if self._metrics:
            lines = [self._loss(columns), self._speed(), self._compute(), self._times()]
        lines.append(row("memory", [self._memory_line()]))
        saved, checked = self._checkpoint, self._validation
        if saved is not None:
            lines.append(row("checkpoint", [saved.text, ago(saved.time)]))
        if checked is not None:
            lines.append(row("validation", [f"loss {checked[0]:.4f}", f"at step {checked[1]:,}", ago(checked[2])]))
        return lines

    def _header(self, columns: int) -> Text:
        done = f"step {self._step:,}/{self._last:,} "
        share = self._step / self._last if self._last else 1.0
        told = f" {math.floor(100 * share)}%  {self._time_left()}"
        phase, seconds = self._liveness.phase, time.monotonic() - self._liveness.since
        if self._step == self._first and phase == "training step":
            told += f"{'compiling, ' if self._compiles else ''}first step: {duration(seconds)}"
        elif phase not in OF_THE_STEP and seconds >= 1.0:
            told += f"  {phase}: {duration(seconds)}"
        line = Text(done, "bold")
        return line.append_text(bar(share, max(4, columns - len(done) - len(told)))).append(told)

    def _time_left(self) -> str:
        if len(self._finished) < 2 or self._step >= self._last:
            return ""
        per_step = (self._finished[-1] - self._finished[0]) / (len(self._finished) - 1)
        seconds = per_step * (self._last - self._step)
        end = time.localtime(time.time() + seconds)
        return f"ETA {duration(seconds)} ({time.strftime('%H:%M' if seconds < 86400 else '%a %d %b %H:%M', end)})"

    def _loss(self, columns: int) -> Text:
        metrics, step = self._metrics, self._logged
        figures = [f"lr {metrics['train/learning_rate']:.1e}"]
        if "train/grad_norm" in metrics:
            figures.append(f"grad norm {metrics['train/grad_norm']:.2f}")
        if "train/loss_scale" in metrics:
            figures.append(f"loss scale {metrics['train/loss_scale']:.0f}")
        if metrics.get("train/skipped_steps"):
            figures.append(f"skipped {metrics['train/skipped_steps']:.0f}")
        if step < self._step:
            figures.append(f"at step {step:,}")
        value = f"{metrics['train/lm_loss']:.3f}"
        room = columns - LABEL_COLUMNS - len(value) - 2 - sum(len(figure) + 2 for figure in figures)
        trend = sparkline(self._losses.means, min(max(room, 0), 48))
        return row("loss", [value, Text(trend, "cyan"), *figures])

    def _speed(self) -> Text:
        metrics = self._metrics
        per_step = metrics["runtime/iteration_time"]  # of the first step there is nothing else
        recent = list(self._finished)[-RECENT_STEPS - 1 :]
        if len(recent) > 1:
            per_step = (recent[-1] - recent[0]) / (len(recent) - 1)
        return row(
            "speed", [f"{1000 * per_step:,.0f} ms/step", f"{short_number(metrics['runtime/tokens_per_sec'])} tokens/s"]
        )

    def _compute(self) -> Text:
        metrics = self._metrics
        rate = short_number(metrics["runtime/flops_per_sec_per_gpu"], "FLOP/s/gpu" if self._on_gpu else "FLOP/s/rank")
        if "runtime/model_flops_utilization" not in metrics:
            return row("compute", [rate])
        of = f" of {self._peak_name}" if self._peak_name else ""
        return row("compute", [rate, f"MFU {metrics['runtime/model_flops_utilization']:.0%}{of}"])

    def _times(self) -> Text:
        """Shares of the host's time in this run, without its first step; where they are measured, those of a step."""
        timed = {name: self._metrics.get(f"runtime/{name}_seconds") for name in PHASES}
        if any(timed.values()):
            known = ((name.replace("_", " "), seconds) for name, seconds in timed.items() if seconds is not None)
            return row("step time", [f"{name} {1000 * seconds:,.1f} ms" for name, seconds in known])
        spent = {name: total - self._before.get(name, 0.0) for name, total in self._liveness.seconds.copy().items()}
        spent["step"] = sum(spent.pop(name, 0.0) for name in OF_THE_STEP)
        whole = sum(spent.values())
        shares = [
            f"{name} {seconds / whole:.0%}" for name, seconds in spent.items() if whole and seconds / whole > 0.005
        ]
        return row("time", shares or ["measured from the second step on"])

    def _memory_line(self) -> str:
        if time.monotonic() - self._asked >= 1.0:
            self._asked, self._said = time.monotonic(), self._memory()
        return self._said


def row(label: str, fields: Iterable[str | Text]) -> Text:
    """A label, and what is behind it, two spaces apart; empty fields are left out."""
    line = Text(f"{label:{LABEL_COLUMNS}}", "dim")
    for number, field in enumerate(field for field in fields if field):
        line.append("  " if number else "").append_text(field if isinstance(field, Text) else Text(field))
    return line


def side_by_side(left: Text, right: Text | None) -> Text:
    """Two lines as one, the right one from a fixed column on."""
    if right is None:
        return left
    line = left.copy()
    line.truncate(STATE_COLUMNS, overflow="ellipsis", pad=True)
    return line.append("  ").append_text(right)


def told(event: Event) -> Text:
    """An event in one line."""
    time_of_day = time.strftime("%H:%M:%S", time.localtime(event.time))
    text = f"{event.kind.replace('_', ' ')}: {' '.join(event.text.split())}"
    return Text(f"{time_of_day}  {text}", "yellow" if event.kind in BAD else "")


def ago(moment: float) -> str:
    """How long ago a moment was, in seconds since 1970."""
    return f"{duration(max(0.0, time.time() - moment))} ago"


def sparkline(values: Sequence[float], columns: int) -> str:
    """The course of values, in at most `columns` bars; those that are not finite are dots.

    The first quarter may be off the scale, as a loss falls most at the beginning.
    """
    if columns <= 0 or not values:
        return ""
    size = max(1, math.ceil(len(values) / columns))
    means = [sum(part) / len(part) for part in (values[at : at + size] for at in range(0, len(values), size))]
    scaled = [mean for mean in means[len(means) // 4 :] if math.isfinite(mean)]
    low, high = min(scaled, default=0.0), max(scaled, default=0.0)
    steps = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    heights = (round((min(max(mean, low), high) - low) * steps) if math.isfinite(mean) else None for mean in means)
    return "".join("·" if height is None else SPARKS[height] for height in heights)
