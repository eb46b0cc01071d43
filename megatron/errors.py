"""The two kinds of failure that a user can act on, and the exit code of each.

Everything else is a defect and keeps its traceback (and Python's exit code 1).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130


class UserError(Exception):
    """The command, the configuration or the input is wrong: exit code 2, before the first step, prompt or batch.

    problems: one message each; what is wrong, where, with which values, and the way out.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run that was started correctly cannot continue: exit code 1."""


@contextmanager
def work_begins() -> Iterator[None]:
    """Turn a UserError raised inside, such as one about ids deep in the data, into a RunError.

    Exit code 2 promises that no work was done, so it must not be returned once work has begun.
    """
    try:
        yield
    except UserError as error:
        raise RunError(str(error)) from error


def exit_code(main: Callable[[], int | None], failures: tuple[type[Exception], ...] = (RunError, OSError)) -> int:
    """Run `main` and return the exit code of the process; what went wrong is printed on stderr.

    0: done (or the code that `main` returned); 1: the work failed; 2: UserError; 130: interrupted by Ctrl-C.
    failures: exceptions that are reported in one line with code 1; all others propagate.
    """
    try:
        return main() or DONE
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return WRONG
    except failures as error:
        print(f"error: {_in_words(error)}", file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED


def first_line(error: Exception) -> str:
    """The type of an exception of a library, and the first line of its text, which may be empty."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def _in_words(error: Exception) -> str:
    """An OSError with its file first and without its number; anything else as it is."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
