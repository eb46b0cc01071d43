"""A limit of time for measurements that are made one after the other."""

import math
import time


class Allowance:
    """So many seconds, from now on."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds
        self._began: float | None = None
        self._longest = 0.0

    def has_room(self) -> bool:
        """Whether one more fits that takes as long as the longest so far. To be called before each."""
        now = time.monotonic()
        if self._began is not None:
            self._longest = max(self._longest, now - self._began)
        self._began = now
        return now + self._longest <= self._end
