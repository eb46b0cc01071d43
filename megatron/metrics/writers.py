"""The stream of metrics, and the writers that record it.

A writer is a class here or beside this file (`local_writers.py`, `services.py`, `prometheus.py`) and an entry of the
registry's kind "metric_writer": a function of `WriterSettings` that returns the writer, or None if the configuration
does not ask for it. Only rank 0 opens writers.

What a writer does not take never ends a run, and holds up no other writer. It is warned of once, recorded as an event,
kept, and offered again every `RETRY_SECONDS` until the writer takes it.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron import registry
from megatron.config.schema.run_keys import LoggingKeys
from megatron.errors import UserError
from megatron.events import EventLog

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
MOST_WAITING = 10_000  # steps that are kept for a writer; beyond, the oldest ones are lost to it
RETRY_SECONDS = 15.0
CLOSE_SECONDS = 30.0  # that a writer in the background may take for its last steps when the run ends


class MetricWriter(ABC):
    """Records the metrics of one step after another. Its constructor raises UserError for what the user must mend."""

    in_background = False  # whether it may take long, as over a network: it then has a thread of its own

    def open(self) -> None:  # noqa: B027  # some writers have nothing to open or close
        """Connect, or open the file. Called before the first `write`, and after a failure until it succeeds."""

    @abstractmethod
    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` for `step`, the number of steps done; called at most once per step.

        Any exception counts as not written: the writer is closed, opened and given the same step again.
        """

    def go_back(self, step: int) -> None:  # noqa: B027
        """Make room for the steps after `step`, which are trained again. It is opened again before they come.

        As for `write`, an exception counts as not done.
        """

    def close(self) -> None:  # noqa: B027
        """Flush and close; also called after a failure."""


@dataclass(frozen=True)
class WriterSettings:
    """What writers need of a run."""

    logging: LoggingKeys
    folder: Path | None  # of metrics.jsonl; None: the run writes no files
    first_step: int  # steps done before this run; 0 unless it resumes
    config: Mapping[str, Any]  # as the user wrote it, to be recorded


class Outlet:
    """A writer with the steps that it has not taken yet.

    Its trouble is told where `write` and `close` are called, so that events have one thread.
    """

    def __init__(self, name: str, writer: MetricWriter, retry_seconds: float = RETRY_SECONDS) -> None:
        """name: in messages and events."""
        self.name = name
        self._writer, self._retry_seconds = writer, retry_seconds
        self._waiting: deque[tuple[int, Mapping[str, float] | None]] = deque()  # None: go back to that step
        self._changed = threading.Condition()
        self._closing = self._is_open = self._is_done = False
        self._failure: str | None = None  # the latest, until the writer works again
        self._is_told = False  # whether the failure has been told
        self._retry_at = 0.0
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name=f"metrics: {name}", daemon=True)
        if writer.in_background:
            self._thread.start()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Take over `values`. Waits for writers to files, and not for those in the background."""
        self._put(step, values)

    def go_back(self, step: int) -> None:
        """Have the writer go back to `step`, once it has taken what came before."""
        self._put(step, None)

    def _put(self, step: int, values: Mapping[str, float] | None) -> None:
        with self._changed:
            self._waiting.append((step, values))
            if len(self._waiting) > MOST_WAITING:
                oldest = next(i for i, (_, values) in enumerate(self._waiting) if values is not None)
                del self._waiting[oldest]
                self._lost += 1
            self._changed.notify()
        if not self._writer.in_background and time.monotonic() >= self._retry_at:
            self._deliver()

    def news(self) -> tuple[str, bool] | None:
        """What is to be told of the writer since the last call, and whether it has failed; else it works again."""
        with self._changed:
            if self._failure is not None and not self._is_told:
                self._is_told = True
                text = f"the metric writer {self.name} has failed ({self._failure}); the run goes on, and it is retried"
                return text, True
            if self._failure is None and self._is_told and not self._waiting:
                lost, self._is_told, self._lost = self._lost, False, 0
                missing = f"; {lost} steps, for which there was no room, are missing there" if lost else ""
                return f"the metric writer {self.name} works again{missing}", False
            return None

    def begin_closing(self) -> None:
        """Let a writer in the background write what waits, for the last time, and close."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, deadline: float) -> str | None:
        """Wait for that, or do it now for any other writer. Returns what could not be done.

        deadline: by time.monotonic(), after which a writer in the background is left to itself.
        """
        if self._writer.in_background:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                return f"the metric writer {self.name} does not end; {self._unwritten()}"
        else:
            self._finish()
        if self._waiting or self._lost:
            return f"the metric writer {self.name} has failed to the end ({self._failure}); {self._unwritten()}"
        return None

    def _unwritten(self) -> str:
        steps = sum(values is not None for _, values in self._waiting)
        return f"{steps + self._lost} logged steps are missing there"

    def _run(self) -> None:
        """The thread of a writer in the background."""
        while not self._closing:
            self._deliver()
            with self._changed:
                if self._closing:
                    break
                if self._failure is not None:
                    self._changed.wait_for(lambda: self._closing, self._retry_at - time.monotonic())
                elif not self._waiting:
                    self._changed.wait()
        self._finish()

    def _finish(self) -> None:
        if self._waiting:
            self._deliver()
        with suppress(Exception):  # `_deliver` has told what there is to tell
            self._writer.close()

    def _deliver(self) -> None:
        """Open the writer if it is closed, and pass it everything that waits, until it fails."""
        try:
            while True:
                if not self._is_open:
                    self._writer.open()
                    self._is_open = True
                with self._changed:
                    if not self._waiting:
                        self._failure = None
                        return
                    item = self._waiting[0]
                step, values = item
                if values is None:
                    self._writer.go_back(step)
                    self._is_open = False
                else:
                    self._writer.write(step, values)
                with self._changed:
                    if self._waiting and self._waiting[0] is item:  # else it was pushed out meanwhile
                        self._waiting.popleft()
        except Exception as error:
            with self._changed:
                self._failure = reason_of(error)
                self._retry_at = time.monotonic() + self._retry_seconds
            self._is_open = False
            with suppress(Exception):
                self._writer.close()


@dataclass
class MetricWriters:
    """Several writers as one. Nothing that a writer does raises here."""

    outlets: Sequence[Outlet] = ()
    events: EventLog = field(default_factory=EventLog)
    _step: int | None = field(default=None, init=False)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Pass `values` to each writer, unless they are empty, and tell of writers that have failed or recovered."""
        self._step = step
        for outlet in self.outlets if values else []:
            outlet.put(step, values)
        self._tell()

    def go_back(self, step: int) -> None:
        """Let each writer go back to `step`, from where the run goes on."""
        for outlet in self.outlets:
            outlet.go_back(step)
        self._tell()

    def close(self) -> None:
        """Let all writers finish, once; those in the background have `CLOSE_SECONDS` together."""
        deadline = time.monotonic() + CLOSE_SECONDS
        outlets, self.outlets = self.outlets, ()
        for outlet in outlets:
            outlet.begin_closing()
        for outlet in outlets:
            if (problem := outlet.close(deadline)) is not None:
                self._report(outlet, problem, failed=True)
            elif (news := outlet.news()) is not None:
                self._report(outlet, *news)

    def _tell(self) -> None:
        for outlet in self.outlets:
            if (news := outlet.news()) is not None:
                self._report(outlet, *news)

    def _report(self, outlet: Outlet, text: str, failed: bool) -> None:
        (log.warning if failed else log.info)("%s", text)
        self.events.record("writer", text, self._step, writer=outlet.name, failed=failed)


def open_writers(settings: WriterSettings, events: EventLog | None = None) -> MetricWriters:
    """The writers of the registry that the configuration asks for. Raises UserError for one that cannot be used."""
    names = registry.names("metric_writer")
    writers = {name: registry.resolve("metric_writer", name)(settings) for name in names}
    outlets = [Outlet(name, writer) for name, writer in writers.items() if writer is not None]
    return MetricWriters(outlets, events or EventLog())


def reason_of(error: Exception) -> str:
    """An exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


@contextmanager
def user_errors(what: str, extra: str = "logging", *caught: type[Exception]) -> Iterator[None]:
    """Raise UserError, with `what` failed and why, for a missing package or exceptions of the types `caught`.

    extra: of pyproject.toml, that has the package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        way_out = f"the package {error.name} is not installed; `pip install 'deepy[{extra}]'` installs it"
        raise UserError(f"{what}: {way_out}") from error
    except caught as error:
        raise UserError(f"{what}: {reason_of(error)}") from error
