"""A run from its first process to its last: start the agents, watch them, pass on stops, end everything, say why.

Nothing here imports torch. The same for all launchers: agents report through files in the run folder.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.config.schema.config import Config
from megatron.launch.failure_report import Outcome, report, say
from megatron.launch.launchers.launcher import Launch, make_job, make_log_folder
from megatron.launch.process_group import StopSignals, start_group, stop_group
from megatron.launch.protocol.heartbeat import RankStatus
from megatron.launch.protocol.job import Job, OrderBook, write_job
from megatron.launch.protocol.records import NodeRecord, first_failure, read_node
from megatron.launch.rollcall import roll_call
from megatron.launch.watchdog import Watchdog

POLL_SECONDS = 0.02
REMOTE_POLL_SECONDS = 0.25
# After the first failure the others have this long to say why they fail too, and nodes to fall silent.
LAST_WORDS_SECONDS = 1.0
REMOTE_LAST_WORDS_SECONDS = 5.0
# DeepSpeed's launcher looks at its children once a second; it may know what ended one of them.
UNCLEAR_SECONDS = 3.0
GRACE_SECONDS = 5.0
URGENT_GRACE_SECONDS = 0.5
# Agents report every second. A node that has failed is known by this silence; without a failure it must last longer.
SILENCE_AFTER_FAILURE_SECONDS = 4.0
SILENCE_SECONDS = 20.0
START_SECONDS = 90.0
STACKS_SECONDS = 10.0
# A rank that began to train a moment ago may not have been told of yet.
NEWS_SECONDS = 1.5


@dataclass
class Node:
    """A node as the launcher knows it. changed_at: when its record last changed, by this machine's clock."""

    host: str
    record: NodeRecord | None
    changed_at: float
    unreachable: str = ""

    @property
    def ended(self) -> bool:
        """Whether its agent has reported its last."""
        return self.record is not None and (self.record.code is not None or bool(self.record.problem))

    def silent_for(self, seconds: float) -> bool:
        """Whether it has said nothing for so long although it has not ended."""
        return not self.ended and self.record is not None and time.monotonic() - self.changed_at > seconds


def supervise(launch: Launch, config: Config, script: Path) -> int:
    """Run `script` on all ranks until they have ended; returns the exit code.

    0: every rank returned 0. 2: a rank found the command or the input wrong. 1: a rank failed, or the run was stopped
    before it could save. Raises UserError before anything is started.
    """
    log_folder = make_log_folder(config, script)
    job = make_job(launch, config, script, log_folder)
    shared = (log_folder or Path.cwd()).resolve() if launch.remote else None
    with tempfile.TemporaryDirectory(prefix=".deepy-" if shared else "deepy-", dir=shared) as folder:
        write_job(Path(folder), job)
        with StopSignals() as signals:
            return Supervisor(launch, config, job, Path(folder), signals).run()


class Supervisor:
    """One run."""

    def __init__(self, launch: Launch, config: Config, job: Job, folder: Path, signals: StopSignals) -> None:
        self._launch, self._job, self._folder, self._signals = launch, job, folder, signals
        self._ends_hangs = config.launcher.watchdog_action == "end"
        self._watchdog = Watchdog(config.launcher.watchdog_timeout)
        self._orders = OrderBook(folder)
        self._nodes = [Node(host or f"node {number}", None, time.monotonic()) for number, host in enumerate(job.hosts)]
        self._started = time.monotonic()
        self._poll = REMOTE_POLL_SECONDS if launch.remote else POLL_SECONDS
        self._hung = False
        self._asked_at: float | None = None  # when a stop was asked for and no rank had begun to train

    def run(self) -> int:
        """Start the agents and stay until all is over; returns the exit code."""
        environment = {**os.environ, **self._launch.settings}
        pipe = subprocess.PIPE if self._launch.remote else None
        self._group = start_group(self._launch.command(self._folder), environment, stderr=pipe)
        reader = threading.Thread(target=self._pass_on_errors, daemon=True)
        reader.start()
        lost: list[Node] = []
        grace = GRACE_SECONDS
        try:
            lost = self._watch()
            grace = URGENT_GRACE_SECONDS if self._signals.urgent or self._stops_at_once() else GRACE_SECONDS
        finally:
            self._end(grace)
            reader.join(timeout=1.0)
            self._look()
        return report(self._outcome(lost))

    def _watch(self) -> list[Node]:
        """Wait until the run is over, lost or to be ended; returns the nodes that are lost."""
        deadline = float("inf")
        while self._group.poll() is None and time.monotonic() < deadline and not self._signals.urgent:
            self._look()
            if self._signals.received and self._orders.given.stop is None:
                if self._stops_at_once():
                    break
                if self._statuses():
                    self._stop_at_step_boundary()
            failed = self._failed()
            if failed and deadline == float("inf"):
                deadline = time.monotonic() + self._last_words()
            lost = self._lost(SILENCE_AFTER_FAILURE_SECONDS if failed else SILENCE_SECONDS)
            if lost or self._all_ended():
                return lost
            if not failed and self._hangs():
                break
            time.sleep(self._poll)
        self._look()
        return self._lost(SILENCE_AFTER_FAILURE_SECONDS)

    def _look(self) -> None:
        """Read what is new."""
        for number, node in enumerate(self._nodes):
            record = read_node(self._folder, number)
            if record is not None and (node.record is None or record.beat != node.record.beat):
                node.record, node.changed_at, node.host = record, time.monotonic(), record.host

    def _records(self) -> list[NodeRecord]:
        return [node.record for node in self._nodes if node.record is not None]

    def _failed(self) -> bool:
        records = self._records()
        return any(record.gone or record.problem or first_failure(record.ranks) for record in records)

    def _all_ended(self) -> bool:
        return all(node.ended for node in self._nodes)

    def _last_words(self) -> float:
        unclear = any(one.code is None for record in self._records() for one in record.gone)
        words = REMOTE_LAST_WORDS_SECONDS if self._launch.remote else LAST_WORDS_SECONDS
        return max(words, UNCLEAR_SECONDS if unclear else 0.0)

    def _lost(self, silence: float) -> list[Node]:
        """Nodes that cannot be reached or have fallen silent; on this machine the process group tells."""
        if not self._launch.remote:
            return []
        late = time.monotonic() - self._started > START_SECONDS
        return [
            node
            for node in self._nodes
            if not node.ended and (node.unreachable or node.silent_for(silence) or (late and node.record is None))
        ]

    def _statuses(self) -> list[RankStatus]:
        """The heartbeats of all ranks, as old as they are now."""
        now = time.monotonic()
        return [
            replace(status, age=status.age + now - node.changed_at)
            for node in self._nodes
            if node.record is not None
            for status in node.record.statuses
        ]

    def _stops_at_once(self) -> bool:
        """Whether a stop that is asked for finds no rank that could save, even when agents had time to tell of one."""
        if not self._signals.received or self._orders.given.stop is not None or self._statuses():
            return False
        self._asked_at = self._asked_at or time.monotonic()
        return time.monotonic() - self._asked_at > NEWS_SECONDS

    def _stop_at_step_boundary(self) -> None:
        name = self._signals.received[0].name
        say(f"{name}: the run ends at the next step boundary, with a checkpoint; Ctrl-C ends it at once")
        self._orders.give(stop=name)

    def _hangs(self) -> bool:
        """Ask the watchdog; if it find_hung_rank, print the roll-call. Whether the run shall end."""
        hanging = self._watchdog.find_hung_rank(self._statuses())
        if hanging is None:
            return False
        statuses = {status.rank: status for status in self._statuses()}
        self._orders.give(stacks=self._orders.given.stacks + 1)
        self._wait_for_stacks()
        records = self._records()
        stacks = [
            one for record in records if record.stacks_round == self._orders.given.stacks for one in record.stacks
        ]
        hosts = {one.rank: record.host for record in records for one in record.ranks}
        say(
            f"watchdog: rank {hanging.rank} has been in step {hanging.step} ({hanging.phase}) for {hanging.age:.0f} s, "
            f"more than {self._watchdog.limit(hanging):.0f} s (watchdog_timeout)\n{roll_call(statuses, stacks, hosts)}"
        )
        for answer in stacks:
            if self._job.log_folder is not None:
                path = Path(self._job.log_folder) / f"stacks_rank_{answer.rank}.txt"
                path.write_text(answer.text or f"no answer; process state {answer.state}\n", encoding="utf-8")
        if self._job.log_folder is not None:
            say(f"the Python stacks of all ranks are in {self._job.log_folder}/stacks_rank_*.txt")
        self._hung = self._ends_hangs
        return self._ends_hangs

    def _wait_for_stacks(self) -> None:
        deadline = time.monotonic() + STACKS_SECONDS
        while time.monotonic() < deadline and self._group.poll() is None:
            self._look()
            if all(record.stacks_round == self._orders.given.stacks for record in self._records()):
                return
            time.sleep(self._poll)

    def _end(self, grace: float) -> None:
        """Leave no process: agents end their ranks; who does not follow is killed, here at least."""
        if self._group.poll() is None and not self._all_ended():
            self._orders.give(end=grace)
        deadline = time.monotonic() + grace + 2 * GRACE_SECONDS
        while self._group.poll() is None and time.monotonic() < deadline and not self._only_lost_are_left():
            self._look()
            time.sleep(self._poll)
        if self._group.poll() is None:
            stop_group(self._group, URGENT_GRACE_SECONDS)

    def _only_lost_are_left(self) -> bool:
        return self._launch.remote and all(
            node.ended or node in self._lost(SILENCE_AFTER_FAILURE_SECONDS) for node in self._nodes
        )

    def _pass_on_errors(self) -> None:
        """Show what the ranks' and the launching program's stderr has, and note which hosts that could not reach."""
        for line in self._group.stderr or ():
            text = line.decode(errors="replace")
            if (match := re.match(r"pdsh@\S+: (\S+): (ssh exited with exit code (\d+)|.*)", text)) is not None:
                self._note_unreachable(match[1], match[2])
                continue
            sys.stderr.write(text)
            sys.stderr.flush()

    def _note_unreachable(self, host: str, why: str) -> None:
        for node in self._nodes:
            if node.host == host:
                node.unreachable = why

    def _outcome(self, lost: list[Node]) -> Outcome:
        records = self._records()
        return Outcome(
            world_size=self._job.world_size,
            nodes=tuple(records),
            lost=tuple((node.host, node.unreachable, node.record is not None) for node in lost),
            code=self._group.returncode,
            stopped_by=self._signals.received[0].name if self._signals.received else None,
            at_once=self._signals.urgent or (bool(self._signals.received) and self._orders.given.stop is None),
            hung=self._hung,
            several_hosts=len(self._nodes) > 1,
        )
