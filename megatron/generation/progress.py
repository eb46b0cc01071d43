"""How far a run is: a bar on a terminal, lines in the log elsewhere."""

import logging
import sys
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron.logging import PROJECT
from megatron.units import duration

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Texts and tokens done, tokens per second, and the time that is left."""

    def __init__(self, done: int, total: int) -> None:
        """done: texts of `total` that an earlier run has generated."""
        self._done, self._first, self._total = done, done, total
        self._tokens = 0
        self._began = self._said = time.monotonic()
        self._open = ExitStack()
        self._bar: tqdm[Any] | None = None
        if sys.stdout.isatty() and sys.stderr.isatty():
            self._open.enter_context(logging_redirect_tqdm([logging.getLogger(PROJECT)]))
            self._bar = self._open.enter_context(
                tqdm(total=total, initial=done, unit="text", dynamic_ncols=True, leave=False, miniters=0)
            )

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def add(self, tokens: int, texts: int) -> None:
        """Tokens were generated, and texts were finished."""
        self._tokens += tokens
        self._done += texts
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._tokens / self.seconds:,.0f} tokens/s", refresh=False)
            self._bar.update(texts)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._said = time.monotonic()
            log.info("%s", self._line())

    def _line(self) -> str:
        line = f"{self._done}/{self._total} texts | {self._tokens / self.seconds:,.1f} tokens/s"
        if self._done == self._first:
            return line
        left = self.seconds / (self._done - self._first) * (self._total - self._done)
        return f"{line} | {duration(left)} left"

    def summary(self) -> str:
        """What was generated, and how fast."""
        return (
            f"{self._done - self._first} texts, {self._tokens} tokens in {self.seconds:.1f} s "
            f"({self._tokens / self.seconds:.1f} tokens/s)"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()
