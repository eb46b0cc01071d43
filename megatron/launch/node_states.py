"""The nodes of a run as deepy.py sees them, from the records of their agents."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.launch.failure_report import say
from megatron.launch.protocol.heartbeat import RankStatus
from megatron.launch.protocol.records import NodeRecord, read_node

# Agents report every second. After a failure elsewhere, a shorter silence is enough to count a node as lost.
SILENCE_AFTER_FAILURE_SECONDS = 4.0
SILENCE_SECONDS = 20.0
START_SECONDS = 90.0
# After so long a silence this process asks whether the folder is to blame, and so long may it take to use it.
DOUBT_SECONDS, SLOW_SECONDS = 2.0, 2.0
PROBE = "probe"


@dataclass
class NodeState:
    """One node. changed_at: when its record last changed, on this machine's monotonic clock."""

    host: str
    record: NodeRecord | None
    changed_at: float
    unreachable: str = ""  # the message of a connection that failed

    @property
    def ended(self) -> bool:
        """Whether its agent has written its last record."""
        return self.record is not None and (self.record.code is not None or bool(self.record.problem))

    def silent_for(self, seconds: float) -> bool:
        """Whether its record has not changed for so long although it has not ended."""
        return not self.ended and self.record is not None and time.monotonic() - self.changed_at > seconds


class NodeStates:
    """All nodes of a run."""

    def __init__(self, folder: Path, hosts: Sequence[str], remote: bool) -> None:
        """folder: where agents write their records. remote: nodes may be lost; else they are child processes."""
        self._folder, self._remote = folder, remote
        self._started = time.monotonic()
        self._updated_at = self._started
        self._trouble_is_told = False
        self._nodes = [NodeState(host or f"node {number}", None, self._started) for number, host in enumerate(hosts)]

    def update(self) -> None:
        """Read the records that have changed.

        Where this process cannot use the folder either, because its disk is full or does not answer, that says nothing
        about the nodes: none counts as silent, and no heartbeat ages.
        """
        slowest = 0.0
        for number, node in enumerate(self._nodes):
            began = time.monotonic()
            record = read_node(self._folder, number)
            slowest = max(slowest, time.monotonic() - began)
            if record is not None and (node.record is None or record.beat != node.record.beat):
                node.record, node.changed_at, node.host = record, time.monotonic(), record.host
        trouble = self._trouble(slowest)
        before, self._updated_at = self._updated_at, time.monotonic()
        if trouble:  # this time counts for nobody
            for node in self._nodes:
                node.changed_at = min(node.changed_at + self._updated_at - before, self._updated_at)
        if trouble and not self._trouble_is_told:
            say(f"whether the ranks still run is not known: {self._folder} {trouble}")
        self._trouble_is_told = bool(trouble)

    def _trouble(self, slowest: float) -> str:
        """What is wrong with the folder; empty: nothing that this process notices. slowest: seconds of one reading."""
        probe = self._folder / PROBE
        try:
            if any(node.silent_for(DOUBT_SECONDS) for node in self._nodes):
                began = time.monotonic()
                probe.write_text("agents write such files", encoding="utf-8")
                probe.unlink()  # a file that is there may be written to on a full disk
                slowest = max(slowest, time.monotonic() - began)
        except OSError as error:
            return f"cannot be written to ({error.strerror})"
        return f"did not answer for {slowest:.0f} s" if slowest > SLOW_SECONDS else ""

    @property
    def records(self) -> list[NodeRecord]:
        """The records of the nodes that have written one."""
        return [node.record for node in self._nodes if node.record is not None]

    @property
    def statuses(self) -> list[RankStatus]:
        """The last heartbeats of all ranks, with their age now."""
        now = time.monotonic()
        return [
            replace(status, age=status.age + now - node.changed_at)
            for node in self._nodes
            if node.record is not None
            for status in node.record.statuses
        ]

    @property
    def failed(self) -> bool:
        """Whether a rank or a node has failed."""
        return any(
            record.gone or record.problem or any(rank.failed for rank in record.ranks) for record in self.records
        )

    @property
    def all_ready(self) -> bool:
        """Whether every agent has written a record, and none a problem: they can start their ranks."""
        return all(node.record is not None and not node.record.problem for node in self._nodes)

    @property
    def all_ended(self) -> bool:
        """Whether every agent has written its last record."""
        return all(node.ended for node in self._nodes)

    def lost(self, silence: float) -> list[NodeState]:
        """Nodes that cannot be reached, did not start, or have not reported for `silence` seconds."""
        if not self._remote:
            return []
        late = time.monotonic() - self._started > START_SECONDS
        return [
            node
            for node in self._nodes
            if not node.ended and (node.unreachable or node.silent_for(silence) or (late and node.record is None))
        ]

    @property
    def only_lost_are_left(self) -> bool:
        """Whether every node has ended or is lost, by the shorter silence."""
        lost = self.lost(SILENCE_AFTER_FAILURE_SECONDS)
        return self._remote and all(node.ended or node in lost for node in self._nodes)

    @property
    def several(self) -> bool:
        """Whether there is more than one node."""
        return len(self._nodes) > 1

    def note_unreachable(self, host: str, reason: str) -> None:
        """Remember that no connection to `host` could be made."""
        for node in self._nodes:
            if node.host == host:
                node.unreachable = reason
