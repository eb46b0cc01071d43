"""The two kinds of failure that a user can do something about.

The doors turn them into exit codes; everything else is a defect and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """The command, the configuration or the input is wrong: exit code 2, before the first step, prompt or batch.

    problems: one message each; what is wrong, where, with which values, and the way out.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run could not go on although it was started rightly: exit code 1."""


@contextmanager
def work_begins() -> Iterator[None]:
    """From here on a UserError, such as one about ids deep in the data, comes too late for exit code 2."""
    try:
        yield
    except UserError as error:
        raise RunError(str(error)) from error
