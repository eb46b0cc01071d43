"""Output to a terminal, and output to a file."""

import os
import signal
import subprocess
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.end_to_end.commands import ENVIRONMENT, SMALL, command, run
from tests.end_to_end.processes import PATIENCE, process_of_rank, steps_done
from tests.terminals import Terminal, terminal

LABELS = ("step ", "loss ", "speed ", "compute ", "step time ", "memory ")


@contextmanager
def started_on(window: Terminal, folder, *words: object, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A command whose standard output and error are the terminal."""
    variables = os.environ | ENVIRONMENT | {"TERM": "xterm-256color", "TMPDIR": str(folder)} | environment
    output = {"stdout": window.descriptor, "stderr": window.descriptor}
    process = subprocess.Popen(command(*words), cwd=folder, env=variables, start_new_session=True, **output)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)


def has_panel(screen: list[str]) -> bool:
    return all(any(line.startswith(label) for line in screen[-9:]) for label in LABELS)


def ended(window: Terminal, process: "subprocess.Popen[bytes]") -> int:
    while process.poll() is None:
        window.read(0.1)
    return process.returncode


def test_a_terminal_gets_a_panel_that_follows_the_window_and_whole_log_lines_above_it(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL + "save: run\nnum_gpus: 1\n")
    with (
        terminal(80, 30) as window,
        started_on(window, tmp_path, "deepy.py", "train.py", "small", "train_iters=1000000") as run,
    ):
        before = termios.tcgetattr(window.descriptor)
        window.wait_for(has_panel, PATIENCE)
        assert all(len(line) < 80 for line in window.screen[-7:])
        window.resize(160, 30)
        window.wait_for(lambda screen: any(line.startswith("step ") and len(line) == 159 for line in screen[-9:]))
        window.wait_for(lambda screen: steps_done(tmp_path / "run") >= 20, PATIENCE)
        run.send_signal(signal.SIGINT)
        assert ended(window, run) == 0
        assert termios.tcgetattr(window.descriptor) == before
        lines = window.everything
        at = next(number for number, line in enumerate(lines) if line.startswith("SIGINT: the run ends"))
        assert any(line.startswith("checkpoint") for line in lines[at:]), "the last panel is kept"
        assert lines[-1].startswith("stopped by SIGINT after step ")
        log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
        assert "step 20/1000000 | loss" in log
        assert "\r" not in log and "\x1b" not in log
        told = [line for line in log.splitlines() if line.startswith("step ")]
        shown = "".join(lines)
        assert told and all(line.replace(" ", "") in shown.replace(" ", "") for line in told), "none is overwritten"


@pytest.mark.long
def test_a_killed_rank_leaves_a_terminal_in_which_the_report_is_read(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL + "save: run\nnum_gpus: 1\n")
    with (
        terminal(100, 40) as window,
        started_on(window, tmp_path, "deepy.py", "train.py", "small", "train_iters=1000000") as run,
    ):
        before = termios.tcgetattr(window.descriptor)
        window.wait_for(has_panel, PATIENCE)
        os.kill(process_of_rank(0, run), signal.SIGKILL)
        assert ended(window, run) == 1
        assert termios.tcgetattr(window.descriptor) == before
        assert any(line.startswith("rank 0 was ended by SIGKILL") for line in window.everything)
        assert not has_panel(window.screen)
        assert b"\x1b[?25l" not in window.written


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "environment"), [(["console=lines"], {}), ([], {"TERM": "dumb"})], ids=["console: lines", "dumb"]
)
def test_a_terminal_gets_plain_lines_if_asked_or_if_it_knows_no_others(tmp_path, words, environment):
    (tmp_path / "small.yml").write_text(SMALL + "num_gpus: 1\n")
    with (
        terminal() as window,
        started_on(window, tmp_path, "deepy.py", "train.py", "small", "train_iters=3", *words, **environment) as run,
    ):
        assert ended(window, run) == 0
        assert any(line.startswith("step 3/3 | loss") for line in window.everything)
        assert b"\x1b" not in window.written


def test_a_pipe_gets_plain_lines(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL)
    done = run(tmp_path, "train.py", "small", "train_iters=2")
    assert "\r" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert " of a measured matmul | ETA 0s" in done.stdout
