"""Run a door as one rank of a run that deepy.py started: `python rank.py SCRIPT [ARGUMENTS]`.

Redirects the rank's output (rank 0 to the terminal and its log, the others to their logs) and records how it ended, so
that deepy.py can print the first uncaught exception last. Standard library only, until the script imports more.
"""

import ctypes
import faulthandler
import os
import runpy
import signal
import sys
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

# This file is run by its path: its folder must not shadow other modules, and the package must be importable.
ROOT = str(Path(__file__).resolve().parents[3])
if __name__ == "__main__":
    sys.path[0] = ROOT

from megatron.errors import WRONG  # noqa: E402
from megatron.launch.process_group import PR_SET_PDEATHSIG  # noqa: E402
from megatron.launch.protocol.attempt import Attempt  # noqa: E402
from megatron.launch.protocol.heartbeat import RUN_FOLDER, STACKS  # noqa: E402
from megatron.launch.protocol.records import RankRecord, write_rank  # noqa: E402

LOG_FOLDER = "DEEPY_LOG_FOLDER"


class Recorder:
    """A stream that keeps the last lines written to it."""

    def __init__(self, lines: int = 60) -> None:
        self._pieces: deque[str] = deque(maxlen=lines)

    def write(self, text: str) -> None:
        """Remember `text`."""
        self._pieces.extend(text.splitlines(keepends=True))

    def flush(self) -> None:
        """Nothing to do."""

    @property
    def text(self) -> str:
        """What was kept."""
        return "".join(self._pieces)


class Tee:
    """A stream that copies everything but progress bars to other streams. In all else it behaves like `stream`."""

    def __init__(self, stream: TextIO, *others: TextIO | Recorder) -> None:
        self._stream = stream
        self._others = others

    def write(self, text: str) -> int:
        """Write to all streams."""
        if "\r" not in text:
            # A full disk under the log must not end the run.
            with suppress(OSError):
                for other in self._others:
                    other.write(text)
                    other.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(arguments: Sequence[str]) -> int:
    """Run the script `arguments[0]` as `__main__` and return its exit code."""
    folder, rank = Path(os.environ[RUN_FOLDER]), int(os.environ["RANK"])
    _die_with_parent()
    # Unbuffered, and written by a signal handler in C, so that it works while Python waits in a collective.
    stacks = (folder / f"stacks_{rank}.txt").open("ab", buffering=0)
    faulthandler.register(STACKS, stacks, all_threads=True)
    record = RankRecord(rank, os.getpid())
    write_rank(folder, record)
    path = Path(os.environ.get(LOG_FOLDER) or folder) / Attempt.of_this_process().log_name(rank)
    try:
        log = path.open("a", encoding="utf-8", buffering=1)  # later runs append, other attempts do not
    except OSError as error:
        text = f"the log {path} cannot be written: {error.strerror}"
        if rank == 0:
            print(text, file=sys.stderr, flush=True)
        write_rank(folder, record.ended(WRONG, "exit", text))
        return WRONG
    errors = Recorder()
    _redirect(rank, log, errors)
    script = arguments[0]
    sys.argv = list(arguments)
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = _exit_code(leaving)
    except BaseException as error:
        text = _traceback(error, script)
        log.write(text)
        write_rank(folder, record.ended(1, "exception", text))
        return 1
    finally:
        log.flush()
    write_rank(folder, record.ended(code, "exit", errors.text))
    return code


def _die_with_parent() -> None:
    """Have the kernel kill this rank when DeepSpeed's launcher dies, whatever kills that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _redirect(rank: int, log: TextIO, errors: Recorder) -> None:
    if rank == 0:
        sys.stdout = Tee(sys.stdout, log)
        sys.stderr = Tee(sys.stderr, log, errors)
        return
    # By descriptor, so that C libraries write there too; only rank 0 reads the terminal.
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stderr = Tee(sys.stderr, errors)


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _traceback(error: BaseException, script: str) -> str:
    """The traceback from the script's frame on, without the frames of this file."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != script:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame or error.__traceback__))


if __name__ == "__main__":
    sys.path.remove(ROOT)
    sys.exit(main(sys.argv[1:]))
