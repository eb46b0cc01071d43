"""generate.py as people use it: at a terminal, in a pipe, and after it was killed."""

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import ENVIRONMENT, SMALL, command, json_lines, run
from tests.end_to_end.processes import PATIENCE, deepy, process_of_rank, wait_for

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
ENDLESS = ("maximum_tokens=1000000", "ignore_end_of_document=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A configuration and its trained model."""
    folder = tmp_path_factory.mktemp("generation")
    (folder / "small.yml").write_text(SMALL + "save: trained\nmaximum_tokens: 8\n")
    run(folder, "train.py", "small", "train_iters=2", "eval_iters=0")
    return folder


class Terminal:
    """A command whose terminal is ours: what it shows, and keys pressed."""

    def __init__(self, folder: Path, *words: object) -> None:
        self.reader, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 160))
        environment = os.environ | ENVIRONMENT | {"XDG_STATE_HOME": str(folder / "state"), "TERM": "xterm"}
        # a session of its own, with this terminal, so that Ctrl-C is a signal to the command
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *command(*words)],
            cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
        )  # fmt: skip
        os.close(terminal)
        self.seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)  # which hangs up
        self.process.kill()
        self.process.wait(timeout=PATIENCE)

    def press(self, keys: str) -> None:
        os.write(self.reader, keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt: between showing it and waiting for keys, CPython's readline would miss it."""
        time.sleep(0.5)
        self.press(CTRL_C)

    def wait_for(self, text: str, more: int = 0) -> str:
        """What is shown up to `text` and at least so many characters more, from where the last wait ended."""
        deadline = time.monotonic() + PATIENCE
        while (place := self.seen.find(text)) < 0 or len(self.seen) < place + len(text) + more:
            assert time.monotonic() < deadline, f"{text!r} is not shown: {self.seen[-500:]!r}"
            if select.select([self.reader], [], [], 1)[0]:
                self.seen += os.read(self.reader, 65536).decode(errors="replace")
        shown, self.seen = self.seen[: place + len(text)], self.seen[place + len(text) :]
        return shown

    def end(self) -> int:
        """The exit code of the command, which ends by itself."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.reader], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.reader, 65536).decode(errors="replace")
                except OSError:  # how the end of a terminal shows on Linux
                    break
        return self.process.wait(timeout=PATIENCE)


INTERACTIVE = ("small", "text_gen_type=interactive")


def test_at_a_terminal_ctrl_c_ends_a_text_and_not_the_conversation_on_several_ranks(folder):
    with Terminal(folder, "deepy.py", "generate.py", *INTERACTIVE, *ENDLESS, "num_gpus=2") as terminal:
        terminal.wait_for(">>> ")
        terminal.press("first\n")
        terminal.wait_for("first\r\n", more=50)
        terminal.press(CTRL_C)
        terminal.wait_for(">>> ")
        terminal.press(UP)  # the last prompt again, and more to it
        terminal.wait_for("first")
        terminal.press(" and second\n")
        terminal.wait_for(" and second\r\n", more=50)
        terminal.press(CTRL_C)
        terminal.wait_for(">>> ")
        terminal.press(CTRL_D)
        assert terminal.end() == 0, terminal.seen
    assert "first and second" in (folder / "state" / "deepy" / "prompts").read_text()


@pytest.mark.long
def test_at_a_terminal_a_second_ctrl_c_ends_the_conversation(folder):
    with Terminal(folder, "generate.py", *INTERACTIVE, *ENDLESS, "prompt_end=';;'") as terminal:
        terminal.wait_for(">>> ")
        terminal.press("half a line")
        terminal.wait_for("half a line")  # Ctrl-C would throw away what the command has not read yet
        terminal.interrupt()
        terminal.wait_for("Ctrl-C once more ends")
        terminal.wait_for(">>> ")
        terminal.press("two\n")
        terminal.wait_for("... ")
        terminal.press("lines;;\n")
        terminal.wait_for("lines;;\r\n", more=50)
        terminal.press(CTRL_C)
        terminal.wait_for(">>> ")
        terminal.interrupt()
        assert terminal.end() == 0, terminal.seen


@pytest.mark.long
def test_at_a_terminal_a_bar_shows_texts_and_tokens_per_second(folder):
    (folder / "many.txt").write_text("prompt\n" * 500)  # a bar appears after two seconds
    with Terminal(
        folder, "generate.py", "small", "-i", "many.txt", "-o", "many.jsonl", "maximum_tokens=32"
    ) as terminal:
        assert terminal.end() == 0, terminal.seen
    assert re.search(r"\d+ of 500 texts .* texts/s .* tokens/s .* left", terminal.seen), terminal.seen
    assert len(json_lines(folder / "many.jsonl")) == 500


def test_prompts_come_through_a_pipe_and_settings_with_them(folder):
    lines = '{"prompt": "a", "logprobs": 1}\n{"prompt": "b", "maximum_tokens": 3, "num_samples": 2, "top_k": 9}\n'
    words = ("small", "-i", "-", "sample_input_format=jsonl", "-o", "piped.jsonl")
    done = run(folder, "generate.py", *words, input=lines)
    assert "3 texts, 14 tokens" in done.stdout and "\r" not in done.stdout + done.stderr
    rows = json_lines(folder / "piped.jsonl")
    assert [(row["context"], row["length"], "logprobs" in row) for row in rows] == [
        ("a", 8, True),
        ("b", 3, False),
        ("b", 3, False),
    ]


@pytest.mark.long
def test_a_conversation_goes_through_a_pipe(folder):
    done = run(folder, "deepy.py", "generate.py", *INTERACTIVE, "num_gpus=1", input="one\n\ntwo\nstop\nthree\n")
    assert done.stdout.count(">>> ") == 4 and len(done.stdout.rpartition("/help lists commands\n")[2]) >= 16


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_where_it_was(folder):
    (folder / "some.txt").write_text("".join(f"prompt {number}\n" for number in range(40)))
    words = ("generate.py", "small", "-i", "some.txt", "maximum_tokens=64", "temperature=1", "num_samples=2")
    broken = folder / "broken.jsonl"
    with deepy(folder, *words, "-o", broken, "num_gpus=2", "generation_batch_size=2") as process:
        wait_for(lambda: broken.exists() and broken.read_text().count("\n") >= 5, process)
        os.kill(process_of_rank(0, process), signal.SIGKILL)
        process.wait(PATIENCE)
    before = broken.read_text()
    kept = before.count("\n")
    assert 5 <= kept < 80
    said = run(folder, *words, "-o", broken).stdout
    assert f"{kept} of 80 texts are in {broken}" in said and f"{80 - kept} texts, " in said
    assert broken.read_text().startswith(before[: before.rindex("\n")])
    run(folder, *words, "-o", "whole.jsonl")
    assert [row["text"] for row in json_lines(broken)] == [row["text"] for row in json_lines(folder / "whole.jsonl")]
    refused = run(folder, *words, "-o", broken, "top_k=5", expect=2)
    assert "has the text of another prompt, model or setting in line 1" in refused.stderr
