"""Which start of a run this is, told by deepy.py to the agents and by them to the ranks. Standard library only."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

ATTEMPT = "DEEPY_ATTEMPT"  # environment of a rank


@dataclass(frozen=True)
class Attempt:
    """One start of a run; under `max_restarts` there may be several.

    resumes: the run has saved since its first start, so it goes on from `save`, whatever `load` says.
    suspect_step: the step at which earlier attempts failed, whose batch is written out before the training begins.
    abandoned: machine and number of each rank 0 of earlier attempts that may still be there, on a node that is lost.
    """

    number: int = 1
    resumes: bool = False
    suspect_step: int | None = None
    abandoned: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of_this_process(cls) -> "Attempt":
        """The attempt that this rank belongs to; the first where deepy.py did not start it."""
        return cls.of(json.loads(os.environ.get(ATTEMPT, "{}")))

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Attempt":
        """From what `asdict` and JSON made of one."""
        return cls(**fields | {"abandoned": tuple((host, process) for host, process in fields.get("abandoned", ()))})

    def environment(self) -> dict[str, str]:
        """The variables that tell a rank."""
        return {ATTEMPT: json.dumps(asdict(self))}

    def log_name(self, rank: int) -> str:
        """The file name of a rank's log: each attempt has logs of its own."""
        return f"rank_{rank}{self._suffix}.log"

    def stacks_name(self, rank: int | Literal["*"]) -> str:
        """The file name of a rank's stacks, after a hang; "*": a pattern for those of all ranks."""
        return f"stacks_rank_{rank}{self._suffix}.txt"

    @property
    def _suffix(self) -> str:
        return "" if self.number == 1 else f"_attempt_{self.number}"


FIRST = Attempt()
