"""Runs a door as one rank of a run that deepy.py started: `python rank.py SCRIPT [ARGUMENTS]`.

It gives the rank its output (rank 0 the terminal, the others a log), and tells the launcher how the rank ended: an
exception that nobody catches is printed there, last of all. Imports nothing beyond the standard library before the
script does.
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

# This file is run by its path. Its folder must not hide other modules, and the package must be found.
ROOT = str(Path(__file__).resolve().parents[3])
if __name__ == "__main__":
    sys.path[0] = ROOT

from megatron.launch.process_group import PR_SET_PDEATHSIG  # noqa: E402
from megatron.launch.protocol.heartbeat import RUN_FOLDER, STACKS  # noqa: E402
from megatron.launch.protocol.records import RankRecord, write_rank  # noqa: E402

LOG_FOLDER = "DEEPY_LOG_FOLDER"


class Recorder:
    """Keeps the last lines of what was written to it."""

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
    """A stream that also writes to others, which get no progress bars. In all else it is the stream."""

    def __init__(self, stream: TextIO, *others: TextIO | Recorder) -> None:
        self._stream = stream
        self._others = others

    def write(self, text: str) -> int:
        """Write everywhere."""
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
    # Unbuffered, and written by a handler in C: it works while Python waits in a collective.
    stacks = (folder / f"stacks_{rank}.txt").open("ab", buffering=0)
    faulthandler.register(STACKS, stacks, all_threads=True)
    record = RankRecord(rank, os.getpid())
    write_rank(folder, record)
    log = open_log(rank, Path(os.environ[LOG_FOLDER]) if LOG_FOLDER in os.environ else None, folder)
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


def open_log(rank: int, log_folder: Path | None, run_folder: Path) -> TextIO:
    """The rank's log, which later runs continue; in the run's own folder if there is no log folder."""
    return ((log_folder or run_folder) / f"rank_{rank}.log").open("a", encoding="utf-8", buffering=1)


def _die_with_parent() -> None:
    """No rank outlives the launcher of its node, whatever kills that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _redirect(rank: int, log: TextIO, errors: Recorder) -> None:
    if rank == 0:
        sys.stdout = Tee(sys.stdout, log)
        sys.stderr = Tee(sys.stderr, log, errors)
        return
    # By descriptor, so that libraries in C write there too; only rank 0 reads the terminal.
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
    """The traceback from the script on, without the frames of this file."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename != script:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame or error.__traceback__))


if __name__ == "__main__":
    sys.path.remove(ROOT)
    sys.exit(main(sys.argv[1:]))
