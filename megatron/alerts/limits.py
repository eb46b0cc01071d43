"""How many alerts may be sent."""

from collections import Counter, deque

PERIOD = 24 * 3600.0
KINDS_WORTH = 3  # of one kind's limit: the most alerts of all kinds together
ALWAYS = ("finish", "failure")
# Kinds of which there are few, and which no number of others may keep back.
SERIOUS = ("restart", "hang", "replicas_differ")


class Limits:
    """At most `per_kind` alerts of a kind, and three times as many of all that are not serious, within any 24 hours."""

    def __init__(self, per_kind: int) -> None:
        self._per_kind = per_kind
        self._sent: deque[tuple[float, str]] = deque()
        self._left_out: Counter[str] = Counter()

    def allow(self, kind: str, now: float) -> bool:
        """Whether an alert may be sent at `now` (seconds); it counts as sent or as left out."""
        if kind in ALWAYS:
            return True
        while self._sent and self._sent[0][0] <= now - PERIOD:
            self._sent.popleft()
        same = sum(other == kind for _, other in self._sent)
        others = sum(other not in SERIOUS for _, other in self._sent)
        is_crowded = kind not in SERIOUS and others >= KINDS_WORTH * self._per_kind
        if same >= self._per_kind or is_crowded:
            self.leave_out(kind)
            return False
        self._sent.append((now, kind))
        return True

    def leave_out(self, kind: str) -> None:
        """Count an alert that is not sent."""
        self._left_out[kind] += 1

    def summary(self) -> str:
        """What was left out since the last summary, such as "not sent: 12 spike"; empty if nothing was."""
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self._left_out.items()))
        self._left_out.clear()
        return f"not sent: {counts}" if counts else ""
