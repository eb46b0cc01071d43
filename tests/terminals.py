"""A real terminal (a pseudo terminal of the kernel) and what stands on its screen."""

import os
import pty
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

import pyte


class Terminal:
    """The user's side: what was written to the terminal, and the screen that this makes."""

    def __init__(self, columns: int, rows: int) -> None:
        self._reader, self.descriptor = pty.openpty()
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=1)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        """As a user who pulls at the window's corner; the screen cuts its lines, as xterm does."""
        termios.tcsetwinsize(self.descriptor, (rows, columns))
        self.read()
        self._screen.resize(rows, columns)

    def read(self, seconds: float = 0.0) -> None:
        """Take in what was written, and what will be written within so many seconds."""
        end = time.monotonic() + seconds
        while select.select([self._reader], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                piece = os.read(self._reader, 65536)
            except OSError:  # how the end of a terminal shows on Linux
                return
            self.written += piece
            self._stream.feed(piece)

    @property
    def screen(self) -> list[str]:
        """The lines of the window, without empty ones at the end."""
        self.read()
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip().split("\n")

    @property
    def everything(self) -> list[str]:
        """The lines that have scrolled away, and those of the window."""
        columns = self._screen.columns
        gone = ["".join(line[at].data for at in range(columns)).rstrip() for line in self._screen.history.top]
        return gone + self.screen

    def wait_for(self, seen: Callable[[list[str]], object], seconds: float = 60.0) -> list[str]:
        """The screen as soon as `seen` finds on it what it looks for."""
        end = time.monotonic() + seconds
        while not seen(self.screen):
            assert time.monotonic() < end, "\n".join(self.everything)
            self.read(0.05)
        return self.screen

    def stream(self) -> TextIO:
        """What a program has as its standard output."""
        return os.fdopen(os.dup(self.descriptor), "w", encoding="utf-8")

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self._reader)


@contextmanager
def terminal(columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    opened = Terminal(columns, rows)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def output_to(window: Terminal) -> Iterator[None]:
    """pytest sets standard output anew for each test, after the fixtures."""
    before = sys.stdout, sys.stderr
    with window.stream() as out:
        sys.stdout = sys.stderr = out
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
