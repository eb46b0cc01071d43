"""Supervise a run: start the agents, watch them, forward stops, terminate all processes, and say how they ended.

The same for all launchers: agents report through files in the run folder. Imports no torch.
"""

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron.config.schema.config import Config
from megatron.errors import UserError
from megatron.events import EventLog
from megatron.launch.failure_report import Outcome, say, write_error
from megatron.launch.hang_reports import HangReports
from megatron.launch.launchers.launcher import LaunchSpec
from megatron.launch.node_states import SILENCE_AFTER_FAILURE_SECONDS, SILENCE_SECONDS, NodeState, NodeStates
from megatron.launch.process_group import StopSignals, start_group, stop_group
from megatron.launch.protocol.heartbeat import CONVERSING, NOT_BEGUN
from megatron.launch.protocol.job import JobSpec, OrderBook, write_job
from megatron.launch.protocol.node_check import MULTIPLYING, TALKING
from megatron.launch.watchdog import Watchdog

POLL_SECONDS = 0.02
REMOTE_POLL_SECONDS = 0.25
# After the first failure: how long the others may still report theirs, and nodes may fall silent.
LAST_REPORTS_SECONDS = 1.0
REMOTE_LAST_REPORTS_SECONDS = 5.0
# DeepSpeed's launcher polls its children once a second, and may know the signal that ended one of them.
UNKNOWN_CODE_SECONDS = 3.0
GRACE_SECONDS = 5.0
URGENT_GRACE_SECONDS = 0.5
# The first heartbeat of a rank reaches this process after at most so long.
FIRST_BEAT_SECONDS = 1.5
PHASES_WITHOUT_STEPS = (CONVERSING, NOT_BEGUN, MULTIPLYING, TALKING)


def run_job(
    launch: LaunchSpec,
    config: Config,
    job: JobSpec,
    log_folder: Path | None,
    signals: StopSignals,
    events: EventLog,
    seconds: float = float("inf"),
) -> Outcome:
    """Run a job on all ranks until they have ended, and longer than `seconds` in no case.

    log_folder: where agents on other machines exchange files with this process; None: in the working folder.
    Raises UserError before anything is started.
    """
    shared = (log_folder or Path.cwd()).resolve() if launch.remote else None
    with ExitStack() as stack:
        try:
            # A node that was given up may still write there while the folder is removed.
            run_folder = tempfile.TemporaryDirectory(
                prefix=".deepy-" if shared else "deepy-", dir=shared, ignore_cleanup_errors=True
            )
            folder = Path(stack.enter_context(run_folder))
            write_job(folder, job)
            orders = OrderBook(folder)
        except OSError as error:
            location = shared or "TMPDIR or /tmp"
            raise UserError(
                f"the folder of the run's status files cannot be made in {location}: {error.strerror}"
            ) from error
        return Supervisor(launch, config, job, folder, orders, signals, events).run(seconds)


class Supervisor:
    """Supervises one job: a run until it ends or fails, or a check of nodes."""

    def __init__(
        self,
        launch: LaunchSpec,
        config: Config,
        job: JobSpec,
        folder: Path,
        orders: OrderBook,
        signals: StopSignals,
        events: EventLog,
    ) -> None:
        self._launch, self._job, self._folder, self._signals = launch, job, folder, signals
        self._ends_hung_runs = config.launcher.watchdog_action == "end"
        self._orders = orders
        self._nodes = NodeStates(folder, job.hosts, launch.remote)
        watchdog = Watchdog(config.launcher.watchdog_timeout)
        self._hangs = HangReports(watchdog, self._nodes, self._request_stacks, job.log_folder, events, job.attempt)
        self._poll = REMOTE_POLL_SECONDS if launch.remote else POLL_SECONDS
        self._hung = False
        self._culprits: tuple[int, ...] = ()
        self._stop_requested_at: float | None = None  # set while no rank has a heartbeat

    def run(self, seconds: float = float("inf")) -> Outcome:
        """Start the agents, and return how the run ended after all processes have. Raises UserError.

        seconds: after which it counts as hung.
        """
        self._give_up_at = time.monotonic() + seconds
        command = self._launch.command(self._folder)
        environment = {**os.environ, **self._launch.settings}
        pipe = subprocess.PIPE if self._launch.remote else None
        try:
            self._group = start_group(command, environment, stderr=pipe)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in an argument
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"{command[0]} cannot be started: {reason}") from error
        reader = threading.Thread(target=self._forward_stderr, daemon=True)
        reader.start()
        lost: list[NodeState] = []
        grace = GRACE_SECONDS
        try:
            lost = self._watch()
            grace = URGENT_GRACE_SECONDS if self._signals.urgent or self._stops_at_once() else GRACE_SECONDS
        finally:
            self._end(grace)
            reader.join(timeout=1.0)
            self._nodes.update()
        return self._outcome(lost)

    def _watch(self) -> list[NodeState]:
        """Wait until the run has ended, failed, lost a node or must be ended; returns the nodes that are lost."""
        deadline = float("inf")
        while self._group.poll() is None and time.monotonic() < deadline and not self._signals.urgent:
            self._nodes.update()
            if self._nodes.all_ready and not self._orders.given.start:
                self._order(start=True)
            if self._is_conversing:
                self._hand_on_interrupts()
            if self._signals.received and self._orders.given.stop is None:
                if self._stops_at_once():
                    break
                if self._has_steps:
                    self._stop_at_step_boundary()
            failed = self._nodes.failed
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + self._last_reports_seconds()
            lost = self._nodes.lost(SILENCE_AFTER_FAILURE_SECONDS if failed else SILENCE_SECONDS)
            if lost or self._nodes.all_ended:
                return lost
            if time.monotonic() > self._give_up_at or self._hangs_for_good(failed):
                self._hung = True
                break
            time.sleep(self._poll)
        self._nodes.update()
        return self._nodes.lost(SILENCE_AFTER_FAILURE_SECONDS)

    def _hangs_for_good(self, failed: bool) -> bool:
        """Whether a new hang was found, and reported, in which the run must end."""
        culprits = None if failed else self._hangs.report_new_hang(self._poll)
        self._culprits = culprits or ()
        return culprits is not None and self._ends_hung_runs

    def _last_reports_seconds(self) -> float:
        unknown = any(one.code is None for record in self._nodes.records for one in record.gone)
        seconds = REMOTE_LAST_REPORTS_SECONDS if self._launch.remote else LAST_REPORTS_SECONDS
        return max(seconds, UNKNOWN_CODE_SECONDS if unknown else 0.0)

    def _stops_at_once(self) -> bool:
        """Whether a stop was requested and no rank can save: none has a heartbeat, after enough time to report it."""
        if not self._signals.received or self._orders.given.stop is not None or self._has_steps:
            return False
        self._stop_requested_at = self._stop_requested_at or time.monotonic()
        return time.monotonic() - self._stop_requested_at > FIRST_BEAT_SECONDS

    @property
    def _is_conversing(self) -> bool:
        return any(status.phase == CONVERSING for status in self._nodes.statuses)

    @property
    def _has_steps(self) -> bool:
        """Whether a rank can stop between two steps."""
        return any(status.phase not in PHASES_WITHOUT_STEPS for status in self._nodes.statuses)

    def _hand_on_interrupts(self) -> None:
        """Give each Ctrl-C to rank 0, where it ends a text, and later the conversation."""
        while signal.SIGINT in self._signals.received:
            self._signals.received.remove(signal.SIGINT)
            self._order(interrupts=self._orders.given.interrupts + 1)

    def _stop_at_step_boundary(self) -> None:
        name = self._signals.received[0].name
        how = "the run ends at the next step boundary, with a checkpoint"
        if Path(self._job.script).name == "serve.py":
            how = "the server takes no more requests, and ends when all others have been answered"
        say(f"{name}: {how}; Ctrl-C ends it at once")
        self._order(stop=name)

    def _request_stacks(self) -> int:
        self._order(stacks=self._orders.given.stacks + 1)
        return self._orders.given.stacks

    def _order(self, **orders: Any) -> None:
        try:
            self._orders.give(**orders)
        except OSError as error:
            say(f"the nodes cannot be given orders: {self._folder} cannot be written to ({error.strerror})")

    def _end(self, grace: float) -> None:
        """Terminate all ranks; kill local survivors after the grace period."""
        if self._group.poll() is None and not self._nodes.all_ended:
            self._order(end=grace)
        deadline = time.monotonic() + grace + 2 * GRACE_SECONDS
        while self._group.poll() is None and time.monotonic() < deadline and not self._nodes.only_lost_are_left:
            self._nodes.update()
            time.sleep(self._poll)
        if self._group.poll() is None:
            stop_group(self._group, URGENT_GRACE_SECONDS)

    def _forward_stderr(self) -> None:
        """Print the stderr of the ranks and of the launching program, and note hosts that it could not reach."""
        for line in self._group.stderr or ():
            text = line.decode(errors="replace")
            if (match := re.match(r"pdsh@\S+: (\S+): (ssh exited with exit code (\d+)|.*)", text)) is not None:
                self._nodes.note_unreachable(match[1], match[2])
                continue
            write_error(text)

    def _outcome(self, lost: list[NodeState]) -> Outcome:
        return Outcome(
            world_size=self._job.world_size,
            nodes=tuple(self._nodes.records),
            lost=tuple((node.host, node.unreachable, node.record is not None) for node in lost),
            code=self._group.returncode,
            stopped_by=self._signals.received[0].name if self._signals.received else None,
            at_once=self._signals.urgent or (bool(self._signals.received) and self._orders.given.stop is None),
            hung=self._hung,
            several_hosts=self._nodes.several,
            culprits=self._culprits,
        )
