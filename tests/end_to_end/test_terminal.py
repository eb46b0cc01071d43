"""Output to a terminal, and output to a file."""

import os
import pty
import subprocess
import termios

from tests.end_to_end.commands import ENVIRONMENT, SMALL, command, run


def on_a_terminal(folder, *words: object) -> str:
    """Everything that a command writes while standard output and error are a terminal."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 160))
    process = subprocess.Popen(
        command(*words), cwd=folder, stdout=terminal, stderr=terminal, env=os.environ | ENVIRONMENT
    )
    os.close(terminal)
    pieces = []
    while True:
        try:
            piece = os.read(reader, 65536)
        except OSError:  # how the end of a terminal shows on Linux
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(reader)
    assert process.wait(timeout=60) == 0, b"".join(pieces).decode()
    return b"".join(pieces).decode()


def test_a_terminal_gets_a_bar_and_whole_log_lines_above_it(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL + "save: run\nnum_gpus: 1\n")
    seen = on_a_terminal(tmp_path, "deepy.py", "train.py", "small")
    assert "20/20" in seen and "step/s" in seen
    assert "\r" in seen.replace("\r\n", "")
    lines = [line.rpartition("\r")[2] for line in seen.replace("\r\n", "\n").split("\n")]
    assert sum(line.startswith("step ") and "tokens/s" in line for line in lines) == 20
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "step 20/20 | loss" in log
    assert "\r" not in log


def test_a_pipe_gets_plain_lines(tmp_path):
    (tmp_path / "small.yml").write_text(SMALL)
    done = run(tmp_path, "train.py", "small", "train_iters=2")
    assert "\r" not in done.stdout + done.stderr
    assert "step/s" not in done.stdout + done.stderr
