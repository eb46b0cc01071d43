"""Lines at the bottom of a terminal, and what other output does to them."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.text import Text

from megatron.launch.failure_report import say
from megatron.terminal import Footer, can_redraw, footer, live
from tests.terminals import Terminal, output_to, terminal

BACKGROUND = """
import fcntl, os, sys, termios, time
from megatron.terminal import Footer
from rich.text import Text

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if job := os.fork():  # the shell; its child is a job of it, at first in the background
    time.sleep(0.6)
    print("$ typed", end="", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.02)
    os.setpgid(job, job)
    os.tcsetpgrp(0, job)
    os.waitpid(job, 0)
else:
    os.setpgid(0, 0)
    drawn = Footer(sys.stdout)
    drawn.show(lambda columns: [Text("at the bottom")])
    time.sleep(60)
"""


@pytest.fixture
def window(monkeypatch):
    """A terminal that can redraw."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("RANK", raising=False)
    with terminal(40, 12) as opened:
        yield opened


def two_lines(columns: int) -> list[Text]:
    return [Text(), Text("first"), Text("x" * 200 if columns < 30 else "second")]


def shown(window: Terminal, last: str = "second") -> list[str]:
    return window.wait_for(lambda screen: screen[-1].endswith(last), seconds=5)


def test_output_appears_above_the_lines_and_they_stay(window):
    with output_to(window), live():
        footer().show(two_lines)
        shown(window)
        print("one")
        print("t", end="")
        sys.stderr.write("an error\n")
        print("wo")
        assert window.screen == ["one", "an error", "two", "", "first", "second"]
        for number in range(20):
            print(f"line {number}")
        assert window.screen[-4:] == ["line 19", "", "first", "second"]
    assert window.screen[-1] == "line 19"
    assert [line for line in window.everything if line.startswith("line")] == [f"line {n}" for n in range(20)]
    assert "first" not in window.everything


def test_what_another_process_writes_is_not_lost(window):
    with output_to(window), live():
        footer().show(two_lines)
        shown(window)
        os.write(window.descriptor, b"from elsewhere\nand more\n")
        expected = ["from elsewhere", "and more", "", "first", "second"]
        window.wait_for(lambda screen: screen == expected, seconds=5)


def test_a_window_of_another_size_gets_lines_of_its_width_and_height(window):
    with output_to(window), live():
        footer().show(two_lines)
        shown(window)
        print("above")
        window.resize(20, 12)
        assert shown(window, "x…") == ["above", "", "first", "x" * 18 + "…"]
        window.resize(60, 12)
        assert shown(window) == ["above", "", "first", "second"]
        window.resize(60, 3)
        shown(window, "first")
        assert "second" not in window.screen, "a line is left for what is above"


def test_the_last_lines_are_kept_if_asked_and_the_cursor_is_below_them(window):
    with output_to(window), live():
        footer().show(two_lines)
        shown(window)
        footer().remove(two_lines, keep=True)
        print("after")
    assert window.screen == ["", "first", "second", "after"]
    assert b"\x1b[?25l" not in window.written, "the cursor is never hidden"


def test_a_fork_of_the_process_writes_what_it_has_to_say(window):
    with output_to(window), live():
        footer().show(two_lines)
        shown(window)
        held, done = threading.Event(), threading.Event()

        def write_a_line() -> None:
            with footer()._lock:
                held.set()
                done.wait(10)

        writing = threading.Thread(target=write_a_line)
        writing.start()
        held.wait()
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)  # ends a child that waits for the lock
            print("from the fork", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        done.set()
        writing.join()
        window.wait_for(lambda screen: "from the fork" in screen and screen[-1] == "second", seconds=5)


def test_bars_of_other_programs_do_not_overwrite_the_lines(window):
    with output_to(window), live():
        footer().show(two_lines)
        shown(window)
        sys.stderr.write("\r 10%|#    | 1/10")
        print("a line", file=sys.stderr)
        assert "a line" in window.screen and "10%" not in "".join(window.screen)
        footer().remove(two_lines)
        sys.stderr.write("\r 20%|##   | 2/10")
        sys.stderr.flush()
        assert "20%" in "".join(window.screen)


def test_a_terminal_that_goes_away_ends_nothing(window):
    class Gone(io.StringIO):
        def fileno(self):
            return window.descriptor

        def write(self, text):
            raise OSError(5, "Input/output error")

    drawn = Footer(Gone())
    drawn.show(two_lines)
    time.sleep(0.1)
    drawn.remove(two_lines, keep=True)
    assert drawn.is_empty


@pytest.mark.parametrize(("variable", "colours"), [("TERM", True), ("NO_COLOR", False)])
def test_no_color_is_respected(window, monkeypatch, variable, colours):
    monkeypatch.setenv(variable, "xterm-256color")
    with output_to(window), live():
        footer().show(lambda columns: [Text("a", style="green"), Text("second")])
        shown(window)
    assert (b"\x1b[32m" in window.written) == colours


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [({"TERM": "dumb"}, True), ({"RANK": "1"}, True), ({}, False)],
    ids=["dumb terminal", "another rank", "console: lines"],
)
def test_nothing_is_drawn_where_it_is_not_wanted_or_possible(window, monkeypatch, environment, wanted):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with output_to(window), live(wanted):
        assert footer() is None


def test_a_pipe_and_a_terminal_of_another_encoding_cannot_redraw(window):
    with window.stream() as out:
        assert can_redraw(out, {"TERM": "xterm"})
        assert not can_redraw(out, {})
    assert not can_redraw(io.TextIOWrapper(io.BytesIO(), "utf-8"), {"TERM": "xterm"})
    with os.fdopen(os.dup(window.descriptor), "w", encoding="latin-1") as narrow:
        assert not can_redraw(narrow, {"TERM": "xterm"})


def test_a_job_in_the_background_leaves_the_shells_line_alone_and_draws_in_the_foreground(tmp_path):
    with terminal(40, 12) as window:
        shell = subprocess.Popen(
            [sys.executable, "-c", BACKGROUND, str(tmp_path / "foreground")], stdin=window.descriptor,
            stdout=window.descriptor, stderr=window.descriptor, start_new_session=True,
            env=os.environ | {"TERM": "xterm"},
        )  # fmt: skip
        window.wait_for(lambda screen: screen == ["$ typed"])
        window.read(0.6)
        assert window.screen == ["$ typed"], "nothing is drawn in the background"
        (tmp_path / "foreground").touch()
        window.wait_for(lambda screen: screen == ["at the bottom"])
        shell.kill()
        shell.wait()


def test_the_launcher_writes_its_report_in_the_place_of_what_a_killed_rank_has_drawn(window):
    drawn = b"\x1b[Jstep 5\r\nloss 1.0\r\x1b[1A"
    with output_to(window):
        os.write(window.descriptor, drawn)
        say("rank 0 was killed")
    assert window.screen == ["rank 0 was killed"]
