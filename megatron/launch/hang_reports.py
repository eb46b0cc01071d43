"""Hung ranks: ask all ranks for their stacks, print the roll call, and write the stacks into the log folder."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron.events import EventLog
from megatron.launch.failure_report import say
from megatron.launch.node_states import NodeStates
from megatron.launch.protocol.attempt import Attempt
from megatron.launch.protocol.heartbeat import RankStatus
from megatron.launch.protocol.records import RankStacks
from megatron.launch.rollcall import culprits, roll_call
from megatron.launch.watchdog import Watchdog

STACKS_SECONDS = 10.0


class HangReports:
    """Reports each hang of a run once."""

    def __init__(
        self,
        watchdog: Watchdog,
        nodes: NodeStates,
        request_stacks: Callable[[], int],
        log_folder: str | None,
        events: EventLog,
        attempt: Attempt,
    ) -> None:
        """request_stacks: orders the stacks of all ranks and returns the number of the request."""
        self._watchdog, self._nodes, self._request_stacks = watchdog, nodes, request_stacks
        self._log_folder = None if log_folder is None else Path(log_folder)
        self._events, self._attempt = events, attempt

    def report_new_hang(self, poll: float) -> tuple[int, ...] | None:
        """Report a hang that has not been reported yet; returns the ranks that others wait for, None: no new hang.

        poll: seconds between reads of the records while ranks write their stacks.
        """
        hung = self._watchdog.find_hung_rank(self._nodes.statuses)
        if hung is None:
            return None
        statuses = {status.rank: status for status in self._nodes.statuses}
        stacks = self._gather_stacks(poll)
        self._tell(hung, roll_call(statuses, stacks, self._hosts()))
        self._write(stacks)
        return culprits(statuses, stacks)

    def _gather_stacks(self, poll: float) -> list[RankStacks]:
        request, deadline = self._request_stacks(), time.monotonic() + STACKS_SECONDS
        while time.monotonic() < deadline and not self._nodes.all_ended:
            self._nodes.update()
            if all(record.stacks_round == request for record in self._nodes.records):
                break
            time.sleep(poll)
        return [one for record in self._nodes.records if record.stacks_round == request for one in record.stacks]

    def _hosts(self) -> dict[int, str]:
        return {rank: record.host for record in self._nodes.records for rank in record.rank_numbers}

    def _tell(self, hung: RankStatus, roll: str) -> None:
        text = (
            f"rank {hung.rank} has been in step {hung.step} ({hung.phase}) for {hung.age:.0f} s, "
            f"more than {self._watchdog.limit(hung):.0f} s (watchdog_timeout)\n{roll}"
        )
        say(f"watchdog: {text}")
        self._events.record("hang", text, hung.step, rank=hung.rank, phase=hung.phase, seconds=round(hung.age, 1))

    def _write(self, stacks: list[RankStacks]) -> None:
        if self._log_folder is None:
            return
        with suppress(OSError):  # a full disk must not end the run
            for one in stacks:
                text = one.text or f"no answer; process state {one.state}\n"
                (self._log_folder / self._attempt.stacks_name(one.rank)).write_text(text, encoding="utf-8")
            say(f"the Python stacks of all ranks are in {self._log_folder / self._attempt.stacks_name('*')}")
