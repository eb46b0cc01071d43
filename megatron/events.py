"""What happens in a run beside its steps: checkpoints, resumes, spikes, restarts, stragglers. One line of JSON each.

The launcher and rank 0 append to the same file, each line in one write. Imports no torch.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron.files import AppendedLines

EVENTS_FILE = "events.jsonl"

Kind = Literal[
    "start", "resume", "finish", "failure", "checkpoint", "validation", "evaluation", "samples", "spike", "rewind",
    "skipped_update", "not_finite", "restart", "hang", "straggler", "replicas_differ", "writer",
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """step: steps done when it happened; None outside of training. time: seconds since 1970. text: one line for people.

    details: for programs, as JSON has them.
    """

    kind: Kind
    text: str
    step: int | None = None
    time: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


class EventLog:
    """Records events in a file, and tells listeners, such as alerts and the panel."""

    def __init__(self, folder: Path | None = None, listeners: Sequence[Callable[[Event], None]] = ()) -> None:
        """folder: of the file; None: no file is written, as on all ranks but the first."""
        self._file = None if folder is None else AppendedLines(folder / EVENTS_FILE, "events are not recorded")
        self._listeners = list(listeners)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Tell `listener` of every event from now on. One that raises ends the run: it must handle its own failures."""
        self._listeners.append(listener)

    def record(self, kind: Kind, text: str, step: int | None = None, **details: Any) -> None:
        """Record what has just happened. A file that cannot be written is warned of once, until it can be again.

        NaN and infinity in `details` become null, as JSON has none.
        """
        event = Event(kind, text, step, time.time(), {name: _as_json(value) for name, value in details.items()})
        if self._file is not None:
            self._file.append(json.dumps(asdict(event)) + "\n")
        for listener in self._listeners:
            listener(event)


def _as_json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


def read_events(folder: Path) -> list[Event]:
    """All events recorded in `folder`, in order; what a crash left of a line is passed over, and so are other kinds."""
    try:
        lines = (folder / EVENTS_FILE).read_bytes().splitlines()
    except OSError:  # there are none, or the disk does not answer now, which must not end what asks
        return []
    return [event for line in lines if (event := event_of(line)) is not None]


def event_of(line: bytes) -> Event | None:
    """The event that a line of the file holds; None for what a crash left of one, and for kinds that are not known."""
    try:
        event = Event(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return event if event.kind in get_args(Kind) else None
