"""Run a script until it ends: start it, and with `max_restarts` start it again after an accident. Imports no torch."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.alerts.sender import open_alerts
from megatron.config.schema.config import Config
from megatron.errors import DONE, FAILED, WRONG, UserError
from megatron.events import EventLog, read_events
from megatron.launch.failure_report import Ending, Outcome, report, say
from megatron.launch.launchers.launcher import LaunchSpec, make_job, make_log_folder
from megatron.launch.node_checks import check_nodes
from megatron.launch.planning import plan_of_ranks
from megatron.launch.process_group import StopSignals
from megatron.launch.protocol.attempt import Attempt
from megatron.launch.protocol.job import JobSpec
from megatron.launch.report_process import ReportProcess
from megatron.launch.smaller_layout import keeping_the_batch
from megatron.launch.supervisor import run_job

# The wait before a restart doubles with every failure, until the run gets further than it ever was.
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 300.0
# A run that fails so often in a row at one step is not restarted: it is the step.
MOST_FAILURES_AT_A_STEP = 3
# A node that failed so often is taken only where there is no other.
FAILURES_OF_A_BAD_NODE = 2
POLL_SECONDS = 0.1


def supervise(launch: LaunchSpec, config: Config, script: Path) -> int:
    """Run `script` on all ranks until they have ended for good; returns the exit code.

    0: every rank returned 0. 2: a rank found the command or the input wrong. 1: a rank failed, or the run was stopped
    before it could save. Raises UserError before anything is started.
    """
    log_folder = make_log_folder(config, script)
    job = make_job(launch, config, script, log_folder)
    told = log_folder if script.name == "train.py" else None
    with open_alerts(config.alerts, told, follow=True) as alerts, StopSignals() as signals:
        events = EventLog(told, [alerts.hear])
        ending = _Run(launch, config, script, log_folder, signals, events).until_it_ends(job)
        _record_end(events, ending, signals)
        if told is not None and config.logging.report and ending.code != WRONG:
            last_report = ReportProcess(told, say)
            last_report.start()
            if ending.code == DONE:
                last_report.wait(lambda: bool(signals.received))  # which leave little time
    return ending.code


def _record_end(events: EventLog, ending: Ending, signals: StopSignals) -> None:
    if ending.code == DONE:
        stopped = f"stopped by {signals.received[0].name} at a step boundary" if signals.received else "done"
        events.record("finish", stopped, code=ending.code)
    else:
        events.record("failure", ending.text, code=ending.code)


class History:
    """The failures of a run: how many, at which steps, and on which nodes."""

    def __init__(self) -> None:
        self.restarts = 0
        self._in_a_row = 0  # failures since the run last got further than ever before
        self._furthest = self._step = 0
        self._at_the_step = 0
        self._of_nodes: Counter[str] = Counter()

    def note(self, step: int, hosts: Sequence[str]) -> None:
        """Remember a failure in `step` (0: before the first one) that began on `hosts`."""
        self._in_a_row = 1 if step > self._furthest else self._in_a_row + 1
        self._furthest = max(step, self._furthest)
        self._at_the_step = self._at_the_step + 1 if step == self._step else 1
        self._step = step
        self._of_nodes.update(hosts)

    @property
    def wait(self) -> float:
        """Seconds to wait before the next start."""
        return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(self._in_a_row - 1, 20))

    def suspect_step(self, failures: int) -> int | None:
        """The step at which the run failed so many times in a row; None: at none."""
        return self._step if self._step and self._at_the_step >= failures else None

    def ordered(self, hosts: Sequence[str]) -> list[str]:
        """`hosts`, with those that failed too often last."""
        return sorted(hosts, key=lambda host: self._of_nodes[host] >= FAILURES_OF_A_BAD_NODE)


@dataclass(frozen=True)
class _Start:
    """Where and how a run starts again. unfit: host and reason of each node left out."""

    launch: LaunchSpec
    config: Config
    unfit: Mapping[str, str]


class _Run:
    """A run with all its attempts."""

    def __init__(
        self,
        launch: LaunchSpec,
        config: Config,
        script: Path,
        log_folder: Path | None,
        signals: StopSignals,
        events: EventLog,
    ) -> None:
        self._launch, self._config, self._script, self._log_folder = launch, config, script, log_folder
        self._signals, self._events = signals, events
        self._most = config.launcher.max_restarts if script.name == "train.py" else 0
        self._history = History()
        self._began_at = time.monotonic()
        self._saved_before = _saved(config)
        self._abandoned: tuple[tuple[str, int], ...] = ()
        self._events_before = 0  # the present attempt

    def until_it_ends(self, job: JobSpec) -> Ending:
        """Run `job`, the first attempt, and those after it; returns how the last one ended."""
        outcome = self._run(self._launch, self._config, job)
        ending, step = self._told(outcome)
        while self._most and self._goes_on_after(ending, step):
            wait = self._history.wait
            where = f"step {step}" if step else "before the first step"
            say(f"restarting in {wait:g} s ({self._history.restarts + 1} of {self._most}): {ending.reason} ({where})")
            if not self._has_waited(wait):
                return self._stopped()
            self._history.restarts += 1
            try:
                ending, step = self._again(ending, step, wait)
            except UserError as error:
                ending, step = _unfit(str(error)), 0
        return ending

    def _run(self, launch: LaunchSpec, config: Config, job: JobSpec, seconds: float = float("inf")) -> Outcome:
        if self._log_folder is not None:
            # As before where there seem to be none, as when the disk does not answer now.
            self._events_before = len(read_events(self._log_folder)) or self._events_before
        return run_job(launch, config, job, self._log_folder, self._signals, self._events, seconds)

    def _told(self, outcome: Outcome) -> tuple[Ending, int]:
        """Report how an attempt ended; with the step in which it did."""
        self._abandoned += outcome.abandoned
        ending = report(outcome)
        if ending.code == WRONG and self._history.restarts:
            # The command and the input were right before, so that a node or a disk is not what it was.
            ending = replace(ending, code=FAILED, is_accident=True)
        if ending.code == FAILED and (ranks := corrupted_ranks(self._log_folder, self._events_before)):
            ending = replace(ending, is_accident=True, rank=ranks[0], hosts=outcome.hosts_of(ranks))
        return ending, outcome.step_of(ending.rank)

    def _goes_on_after(self, ending: Ending, step: int) -> bool:
        """Whether the run starts again after `ending` in `step`; says why not."""
        if ending.code != FAILED or self._signals.received:
            return False
        self._history.note(step, ending.hosts)
        suspect = self._history.suspect_step(MOST_FAILURES_AT_A_STEP)
        limit = self._config.launcher.time_limit_minutes
        if not ending.is_accident:
            why = "the same would happen again"
        elif suspect is not None:
            file = Path(self._log_folder or "") / f"bad_batch_step_{suspect}.jsonl"
            batch = f"; its batch is in {file}" if file.is_file() else ""
            why = f"it has failed {MOST_FAILURES_AT_A_STEP} times in a row at step {suspect}{batch}"
        elif self._history.restarts >= self._most:
            why = f"max_restarts ({self._most}) is used up"
        elif limit is not None and self._minutes_left(limit) <= 0:
            why = f"time_limit_minutes ({limit:g}) is over"
        else:
            return True
        say(f"the run is not restarted: {why}")
        return False

    def _has_waited(self, seconds: float) -> bool:
        """Wait; False: a signal asked to stop meanwhile."""
        end = time.monotonic() + seconds
        while not self._signals.received and time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, seconds))
        return not self._signals.received

    def _stopped(self) -> Ending:
        text = f"stopped by {self._signals.received[0].name} while the run was about to restart; what was saved remains"
        say(text)
        return Ending(FAILED, text)

    def _again(self, before: Ending, step: int, waited: float) -> tuple[Ending, int]:
        """Start again where that is possible; returns how that ended, and in which step.

        before: how the last attempt ended, in `step`. Raises UserError where nothing can be started any more.
        """
        start = self._fit_start()
        if self._signals.received:
            return self._stopped(), 0
        if isinstance(start, str):
            return _unfit(start), 0
        number = self._history.restarts + 1
        left_out = "".join(f"; {host} is left out: {why}" for host, why in start.unfit.items())
        nodes = f" on {', '.join(start.launch.hosts)}" if len(self._launch.nodes) > 1 else ""
        text = f"restart {self._history.restarts} of {self._most}{nodes}{left_out}"
        say(text)
        self._events.record(
            "restart",
            f"{text}; after: {before.reason}",
            step,
            reason=before.reason,
            rank=before.rank,
            node=before.hosts[0] if before.hosts else None,
            wait=waited,
            attempt=number,
            nodes=list(start.launch.hosts),
            left_out=dict(start.unfit),
        )
        suspect = self._history.suspect_step(MOST_FAILURES_AT_A_STEP - 1)
        attempt = Attempt(number, _saved(self._config) != self._saved_before, suspect, self._abandoned)
        job = make_job(start.launch, start.config, self._script, self._log_folder, attempt)
        outcome = self._run(start.launch, start.config, job)
        return self._told(outcome)

    def _fit_start(self) -> _Start | str:
        """Choose nodes that pass the check, and a layout for them; or the reason why there are none."""
        unfit: dict[str, str] = {}
        while not self._signals.received:
            left = [host for host in self._history.ordered(list(self._launch.nodes)) if host not in unfit]
            if not left:
                break
            try:
                start = replace(self._largest(left[: len(self._launch.hosts)]), unfit=unfit)
            except UserError as error:
                return str(error)
            result = check_nodes(start.launch, start.config, self._run)
            if result.problem:
                return f"the check before the restart failed: {result.problem}"
            if not result.unfit:
                return start
            unfit |= result.unfit
        return "no node is fit to run on: " + "; ".join(f"{host}: {why}" for host, why in unfit.items())

    def _largest(self, hosts: Sequence[str]) -> _Start:
        """The start on as many of `hosts` as a layout fits, with the batch of the first attempt. Raises UserError."""
        problem = None
        batch = plan_of_ranks(self._config, self._script.name, self._launch.ranks).batch
        for count in range(len(hosts), 0, -1):
            chosen = sorted(hosts[:count], key=list(self._launch.nodes).index)
            launch, config = self._launch.on(chosen), self._in_time_left()
            if launch.ranks == self._launch.ranks:
                return _Start(launch, config, {})
            try:
                return _Start(launch, keeping_the_batch(config, batch, launch.ranks), {})
            except UserError as error:
                problem = problem or error
        raise UserError(f"the run cannot go on with {', '.join(hosts)} alone: {problem}")

    def _in_time_left(self) -> Config:
        """The configuration with what is left of the time limit."""
        keys = self._config.launcher
        if keys.time_limit_minutes is None:
            return self._config
        left = max(self._minutes_left(keys.time_limit_minutes), 1e-3)
        return self._config.model_copy(update={"launcher": keys.model_copy(update={"time_limit_minutes": left})})

    def _minutes_left(self, limit: float) -> float:
        return limit - (time.monotonic() - self._began_at) / 60


def corrupted_ranks(log_folder: Path | None, before: int) -> tuple[int, ...]:
    """The ranks whose weights were found to differ from their replicas' in an attempt.

    before: how many events had been recorded when it began; the clocks of two machines cannot tell. Such a run ends
    itself, but the fault is its machine's, and no checkpoint has it.
    """
    events = read_events(log_folder)[before:] if log_folder is not None else []
    found = [event.details for event in events if event.kind == "replicas_differ"]
    return tuple(found[-1].get("ranks", ())) if found else ()


def _unfit(text: str) -> Ending:
    """A restart that could not begin: it counts as a failure, after which the nodes may be better."""
    say(text)
    return Ending(FAILED, text, is_accident=True)


def _saved(config: Config) -> list[tuple[str, int]]:
    """What differs between two calls if something was saved meanwhile: names, and when `latest` was written."""
    if config.checkpoint.save is None:
        return []
    save, written = Path(config.checkpoint.save), []
    with suppress(OSError):  # not written yet
        written = [("latest", (save / "latest").stat().st_mtime_ns)]
    return [*written, *sorted((path.name, 0) for path in save.glob("global_step*"))]
