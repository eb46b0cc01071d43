"""Detection of hung ranks from their heartbeats. Standard library only."""

from collections.abc import Iterable

from megatron.launch.protocol.heartbeat import CONVERSING, NOT_BEGUN, RankStatus

MEDIANS = 10
LEAST_SECONDS = 300.0
# Start-up, the first step (which may compile), a checkpoint and going back to one take long without a beat.
PATIENT_SECONDS = 900.0
PATIENT_PHASES = (NOT_BEGUN, "starting", "saving", "rewinding")


class Watchdog:
    """Decides which ranks hang, by the age of their heartbeats.

    A step may take `timeout` seconds; if unset, ten times the running median of earlier steps, at least five minutes.
    Start-up, the first step, saving and rewinding get at least 15 minutes, a conversation any time. 0 turns the
    watchdog off.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._reported: set[tuple[int, str]] = set()

    def limit(self, status: RankStatus) -> float:
        """Seconds without a beat after which this rank counts as hung."""
        if self._timeout == 0 or status.phase == CONVERSING:
            return float("inf")
        limit = self._timeout or max(LEAST_SECONDS, MEDIANS * (status.median or 0.0))
        patient = status.median is None or status.phase in PATIENT_PHASES
        return max(limit, PATIENT_SECONDS) if patient else limit

    def find_hung_rank(self, statuses: Iterable[RankStatus]) -> RankStatus | None:
        """The rank that has hung for longest, or None; each step and phase is reported once.

        So are those of the ranks that are not silent for long enough yet: they wait for it.
        """
        known = list(statuses)
        hanging = [status for status in known if status.age > self.limit(status)]
        fresh = [status for status in hanging if (status.step, status.phase) not in self._reported]
        if hanging:
            self._reported |= {(status.step, status.phase) for status in known}
        return max(fresh, key=lambda status: status.age, default=None)
