"""The error of a wrong configuration."""

from collections.abc import Sequence

from megatron.errors import UserError


class ConfigError(UserError):
    """The configuration is wrong; `problems` has one message for each thing to correct."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in {source}:", *(f"  {problem}" for problem in problems))
        self.problems = tuple(problems)
