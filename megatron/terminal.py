"""Lines that stay at the bottom of a terminal, such as a bar, while all other output scrolls above them.

After each drawing the cursor goes back to the beginning of the first line. So whatever any process writes to the
terminal takes the place of the lines, which are then drawn again below it. Nothing is counted: not when the window is
resized, nor when the terminal wraps its lines anew. The cursor stays visible and no mode of the terminal is changed, so
a process that is killed leaves nothing to be restored.
"""

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.text import Text

REDRAW_SECONDS = 0.5
# From the cursor to the end of the screen. Without a place: what other processes write may have moved the cursor.
ERASE_BELOW = "\x1b[J"
ERASE = f"\r{ERASE_BELOW}"
UNKNOWN_SIZE = os.terminal_size((80, 24))

# The lines of a part of the footer, none wider than the given number of columns.
Part = Callable[[int], "list[Text]"]


def can_redraw(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `stream` is a terminal that erases and moves the cursor, and shows the characters of a bar."""
    encoding = (stream.encoding or "").lower().replace("-", "")
    return stream.isatty() and environment.get("TERM", "dumb") != "dumb" and encoding == "utf8"


@contextmanager
def live(wanted: bool = True) -> Iterator[None]:
    """A block in which this process may draw at the bottom of its terminal; `footer` then returns where.

    It may if it is rank 0 and standard output is a terminal that can redraw; otherwise, and without `wanted`, nothing
    changes. What is written to standard output and error meanwhile appears above the footer.
    """
    if not wanted or os.environ.get("RANK", "0") != "0" or not can_redraw(sys.stdout):
        yield
        return
    before = sys.stdout, sys.stderr
    drawn = Footer(sys.stdout)
    sys.stdout = cast(TextIO, Above(sys.stdout, drawn))
    if sys.stderr.isatty():
        sys.stderr = cast(TextIO, Above(sys.stderr, drawn))
    try:
        yield
    finally:
        drawn.close()
        sys.stdout, sys.stderr = before


def footer() -> "Footer | None":
    """The footer of this process; None outside of `live`, and where that draws none."""
    return sys.stdout.footer if isinstance(sys.stdout, Above) else None


class Footer:
    """Draws its parts, one below the other, twice a second from a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        """stream: the terminal."""
        from rich.console import Console  # a twentieth of a second, and terminals only

        self._stream = stream
        self._console = Console(file=io.StringIO(), force_terminal=True, highlight=False, markup=False, emoji=False)
        self._parts: list[Part] = []
        self._lock = threading.RLock()  # a signal handler may log while its thread writes
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._job = _job_on_terminal(stream)
        self._drawn = ""  # the frame on the screen

    def show(self, part: Part) -> None:
        """Add a part below the others. It is called from another thread, and must not raise."""
        with self._lock:
            self._parts.append(part)
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw_repeatedly, name="footer", daemon=True)
                self._thread.start()

    def remove(self, part: Part, keep: bool = False) -> None:
        """Remove a part. keep: leave its lines on the screen, as they are now, above what follows."""
        with self._lock:
            if part not in self._parts:
                return
            self._parts.remove(part)
            if keep and self._in_foreground:
                self._put(f"{ERASE}{self._rendered([part])}\n")
                self._drawn = ""
            if self._parts or self._drawn:
                self._draw()

    def write(self, stream: TextIO, text: str) -> None:
        """Write `text`, whole lines, to `stream` above the footer."""
        if os.getpid() != self._process:  # a fork has a copy of this object, and nobody who would release its lock
            stream.write(text)
            return
        with self._lock:
            if self._drawn:
                self._put(ERASE)
            stream.write(text)
            if self._drawn:
                stream.flush()
                self._put(self._drawn)

    @property
    def is_empty(self) -> bool:
        """Whether it has no parts."""
        return not self._parts

    def close(self) -> None:
        """Remove all parts."""
        with self._lock:
            for part in list(self._parts):
                self.remove(part)

    def _draw_repeatedly(self) -> None:
        while True:
            with self._lock:
                if not self._parts:
                    self._thread = None
                    return
                self._draw()
            time.sleep(REDRAW_SECONDS)

    def _draw(self) -> None:
        if not self._in_foreground:
            # The shell has the cursor: take away what stood behind and below it, and draw nothing meanwhile.
            self._put(ERASE_BELOW if self._drawn else "")
            self._drawn = ""
            return
        text = self._rendered(self._parts)
        height = text.count("\n")
        frame = f"{text}\r" + (f"\x1b[{height}A" if height else "") if text else ""
        if frame or self._drawn:
            self._put(ERASE + frame)
        self._drawn = frame

    def _rendered(self, parts: list[Part]) -> str:
        """The lines of `parts`, cut to the window; one line of the window is left to the output above."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, rows = 0, 0
        columns, rows = columns or UNKNOWN_SIZE.columns, rows or UNKNOWN_SIZE.lines
        # The last column stays free: after a character there, terminals differ in where the cursor is.
        self._console.size = columns - 1, rows
        lines = [line for part in parts for line in part(columns - 1)][: max(rows - 1, 1)]
        with self._console.capture() as captured:
            self._console.print(*lines, sep="\n", no_wrap=True, overflow="ellipsis", crop=True)
        return captured.get().removesuffix("\n")

    def _put(self, text: str) -> None:
        """Write to the terminal. One that is gone must end neither the thread nor the run."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()

    @property
    def _in_foreground(self) -> bool:
        """Whether the terminal's job is ours: not in the background of a shell, nor suspended."""
        if self._job is None:
            return True
        fields = _stat(self._job)
        return fields is not None and fields[2] == fields[5]


class Above:
    """A stream whose text appears above a footer, a line at a time. In all else it behaves like `stream`."""

    def __init__(self, stream: TextIO, footer: Footer) -> None:
        self._stream, self.footer = stream, footer
        self._pending = ""  # the beginning of a line

    def write(self, text: str) -> int:
        """Write `text`; bars of other programs are left out while there is a footer, which they would overwrite."""
        if self.footer.is_empty:
            self._release()
            return self._stream.write(text)
        if "\r" not in text:
            lines, newline, self._pending = (self._pending + text).rpartition("\n")
            if newline:
                self.footer.write(self._stream, lines + newline)
        return len(text)

    def flush(self) -> None:
        """Flush the stream; the beginning of a line is kept until its end, or the end of the footer."""
        if self.footer.is_empty:
            self._release()
        self._stream.flush()

    def _release(self) -> None:
        pending, self._pending = self._pending, ""
        if pending:
            self._stream.write(pending)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _job_on_terminal(stream: TextIO) -> int | None:
    """The process among this one and its ancestors whose job the shell moves to the background and back.

    Ranks are in sessions of their own, without a terminal; the process is then deepy.py. None: not known.
    """
    device = os.fstat(stream.fileno()).st_rdev
    minor = os.minor(device)
    number = (minor & 0xFF) | (os.major(device) << 8) | ((minor & ~0xFF) << 12)  # as /proc has it
    process = os.getpid()
    while process > 1 and (fields := _stat(process)) is not None:
        if int(fields[4]) == number:
            return process
        process = int(fields[1])
    return None


def _stat(process: int) -> list[str] | None:
    """State, parent, process group, session, terminal, foreground group, ... of a process; None where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
