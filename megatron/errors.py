"""The two kinds of failure that a user can do something about.

Floor 0. The doors turn them into exit codes; everything else is a defect and keeps its traceback.
"""


class UserError(Exception):
    """The command, the configuration or the input is wrong: exit code 2, before any work.

    problems: one message each; what is wrong, where, with which values, and the way out.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """A run could not go on although it was started rightly: exit code 1."""
