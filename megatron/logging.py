"""One logger for the project, of which rank 0 prints everything and the other ranks only warnings and errors.

Modules log with `logging.getLogger(__name__)` of the standard library; `configure` sets the handler.
"""

import logging
import sys

PROJECT = "megatron"


class _RankFormatter(logging.Formatter):
    """Plain text for messages below WARNING; warnings and errors carry their level and rank."""

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

    rank: global rank of this process. Calling it again replaces the handler.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_RankFormatter(rank))
    logger = logging.getLogger(PROJECT)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
