"""Tell of something that has happened to a run: in the log and among its events."""

import logging
from typing import Any

import torch.distributed as dist

from megatron.events import EventLog, Kind

log = logging.getLogger(__name__)


def report(events: EventLog, kind: Kind, text: str, step: int, **details: Any) -> None:
    """Record an event, and warn of it on rank 0: all ranks come to the same findings."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.warning("%s", text)
    events.record(kind, text, step, **details)
