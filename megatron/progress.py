"""How far a piece of work is that may take long: a bar at the bottom of a terminal, now and then a line elsewhere.

Work of less than two seconds shows nothing, and only rank 0 shows anything. Lines go to standard error, because the
standard output of some commands is their result.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from megatron.terminal import Footer, footer
from megatron.units import duration, short_number

if TYPE_CHECKING:
    from rich.text import Text

SHOWN_AFTER_SECONDS = 2.0
SECONDS_BETWEEN_LINES = 30.0
BAR_COLUMNS = 24

T = TypeVar("T")


class Progress:
    """Counts what is done of a piece of work, and shows share, rate and the time left while the block runs."""

    def __init__(self, what: str, total: float | None = None, unit: str = "", done: float = 0) -> None:
        """what: is being done, such as "loading run/global_step100". total: None if it is not known.

        unit: "B" for bytes, or a word in the plural; "": what is done is not counted. done: before this block.
        """
        self._what, self.total, self._unit = what, total, unit
        self._first = self._done = done
        self._counting = threading.Lock()
        self._footer: Footer | None = None
        self._is_silent = os.environ.get("RANK", "0") != "0"
        self._began = self._said = time.monotonic()
        self.note = ""  # follows the figures

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    @property
    def done(self) -> float:
        """Of the total."""
        return self._done

    def add(self, amount: float = 1) -> None:
        """So much more is done. From any thread."""
        with self._counting:
            self._done += amount
            is_due = time.monotonic() - self._said >= SECONDS_BETWEEN_LINES
            if is_due:
                self._said = time.monotonic()
        if is_due and self._footer is None and not self._is_silent:
            print(self.line, file=sys.stderr, flush=True)

    @property
    def line(self) -> str:
        """The present state in one line."""
        return " | ".join([f"{self._what}: {self._share}" if self._share else self._what, *self._figures])

    @property
    def _share(self) -> str:
        return f"{min(1.0, self._done / self.total):.0%}" if self.total else ""

    @property
    def _figures(self) -> list[str]:
        seconds, added = max(self.seconds, 1e-9), self._done - self._first
        figures = []
        if self._unit and self._done:
            of = f" of {_amount(self.total, self._unit)}" if self.total else ""
            figures = [f"{_amount(self._done, '' if of and self._unit != 'B' else self._unit)}{of}"]
            figures += [f"{_amount(added / seconds, self._unit)}/s"]
        figures += [self.note] if self.note else []
        if self.total and added > 0 and self._done < self.total:
            return [*figures, f"{duration(max(1.0, seconds / added * (self.total - self._done)))} left"]
        return figures if self._done and self.total else [*figures, duration(seconds)]

    def lines(self, columns: int) -> "list[Text]":
        """For the footer: nothing at first, then one line."""
        from rich.text import Text

        if self.seconds < SHOWN_AFTER_SECONDS:
            return []
        text = Text(self._what)
        if self.total:
            text.append("  ").append_text(bar(self._done / self.total, min(BAR_COLUMNS, columns // 4)))
            text.append(f" {self._share}")
        return [text.append("  ").append("  ".join(self._figures), style="dim")]

    def __enter__(self) -> Self:
        self._began = self._said = time.monotonic()
        self._footer = footer()
        if self._footer is not None:
            self._footer.show(self.lines)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._footer is not None:
            self._footer.remove(self.lines)


def counted(items: Iterable[T], what: str, unit: str, total: float | None = None) -> Iterator[T]:
    """`items`, with the progress of going through them. total: their number; None: their length, if they have one."""
    known = len(items) if total is None and isinstance(items, Sized) else total
    with Progress(what, known, unit) as progress:
        for item in items:
            yield item
            progress.add()


def bar(share: float, columns: int) -> "Text":
    """A bar of so many columns, of which `share` (0 to 1) is filled."""
    from rich.text import Text

    halves = round(2 * columns * min(1.0, max(0.0, share)))
    filled = "━" * (halves // 2) + "╸" * (halves % 2)
    return Text.assemble((filled, "green"), ("─" * (columns - len(filled)), "dim"))


def _amount(value: float, unit: str) -> str:
    if unit == "B":
        return short_number(float(value), "B")
    whole = int(value) if value == int(value) else value
    return f"{short_number(whole)} {unit}".rstrip()
