"""When ranks have been silent for too long, from their heartbeats. Floor 2, standard library only."""

from collections.abc import Iterable

from megatron.launch.heartbeat import Pulse

MEDIANS = 10
LEAST_SECONDS = 300.0
# Set-up, the first step (which may compile) and a checkpoint take long without a sign of life.
PATIENT_SECONDS = 900.0
PATIENT_PHASES = ("starting", "saving")


class Watchdog:
    """Judges the age of heartbeats.

    A step may take `timeout` seconds; unset, ten times the running median of the steps before it and at least five
    minutes. What is known to be slow may take at least a quarter of an hour. 0 turns it off.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._reported: set[tuple[int, str]] = set()

    def limit(self, pulse: Pulse) -> float:
        """Seconds without a beat after which this rank hangs."""
        if self._timeout == 0:
            return float("inf")
        limit = self._timeout or max(LEAST_SECONDS, MEDIANS * (pulse.median or 0.0))
        patient = pulse.median is None or pulse.phase in PATIENT_PHASES
        return max(limit, PATIENT_SECONDS) if patient else limit

    def bites(self, pulses: Iterable[Pulse]) -> Pulse | None:
        """A rank that hangs, the one silent for longest; each step and phase is reported once."""
        hanging = [pulse for pulse in pulses if pulse.age > self.limit(pulse)]
        fresh = [pulse for pulse in hanging if (pulse.step, pulse.phase) not in self._reported]
        self._reported |= {(pulse.step, pulse.phase) for pulse in hanging}
        return max(fresh, key=lambda pulse: pulse.age, default=None)
