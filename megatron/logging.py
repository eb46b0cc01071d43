"""Who says what: one logger for the project, and only the first rank speaks unasked.

Any file logs with `logging.getLogger(__name__)` of the standard library; `configure` decides what becomes of it.
"""

import logging
import sys

PROJECT = "megatron"


class _RankFormatter(logging.Formatter):
    """Plain text for what is said in the normal course; warnings and errors carry their level and rank."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno < logging.WARNING:
            return text
        speaker = f" (rank {self._rank})" if self._rank else ""
        return f"{record.levelname.lower()}{speaker}: {text}"


def configure(rank: int) -> None:
    """Send the project's messages to stdout: everything from INFO up on rank 0, warnings and errors elsewhere.

    rank: this process's place in the world. Calling it again replaces what an earlier call set.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_RankFormatter(rank))
    logger = logging.getLogger(PROJECT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
