"""Send alerts from a thread, so that nothing waits for a webhook and no failure of it reaches the run.

deepy.py sends them: it outlives the ranks, and holds the secrets. It reads what rank 0 records in the events file of
the log folder. A rank that was started without deepy.py sends its own.
"""

import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from megatron.alerts.channels import Alert, Channel, Command, NotSentError, Webhook
from megatron.alerts.limits import Limits
from megatron.config.schema.run_keys import AlertKeys
from megatron.errors import UserError
from megatron.events import EVENTS_FILE, Event, event_of

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
LAST_SECONDS = 20.0  # for what is still to be sent when the run has ended
MOST_WAITING = 100
LONGEST_TEXT = 2000  # characters
LONGEST_DETAILS = 2000  # characters of JSON
MOST_NEWS = 1 << 20  # bytes of the events file that are read at once
# The kinds that deepy.py records itself, and tells by `hear` even where the file cannot be written.
OF_LAUNCHER = ("finish", "failure", "hang", "restart")


class Alerts:
    """Sends the events that it hears of, and those that appear in a file. A context, at whose end the rest is sent."""

    def __init__(
        self, channels: Sequence[Channel], kinds: Sequence[str], limits: Limits, run: str, follow: Path | None = None
    ) -> None:
        """kinds: of events to send. run: its log folder. follow: the events file to read from its present end on."""
        self._channels, self._kinds, self._limits, self._run = channels, kinds, limits, run
        self._waiting: queue.Queue[Event | None] = queue.Queue(MOST_WAITING)
        self._overflow: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._file = None if follow is None else EventsFile(follow)
        self._works = dict.fromkeys(range(len(channels)), True)
        self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)

    def hear(self, event: Event) -> None:
        """A listener of an `EventLog`: queue the event to be sent, and return at once."""
        if not self._channels or event.kind not in self._kinds:
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._overflow.put(event.kind)

    def __enter__(self) -> Self:
        if self._channels:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Send what is waiting, within `LAST_SECONDS`."""
        if not self._channels:
            return
        deadline = time.monotonic() + LAST_SECONDS
        with suppress(queue.Full):
            self._waiting.put(None, timeout=LAST_SECONDS)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            log.warning("the last alerts are not sent: that took more than %.0f s", LAST_SECONDS)

    def _work(self) -> None:
        while True:
            try:
                event = self._waiting.get(timeout=POLL_SECONDS)
            except queue.Empty:
                self._send_news()
                continue
            self._send_news()  # of before the event
            if event is None:
                break
            self._consider(event)
        if summary := self._limits.summary():
            self._send(replace(_alert(Event("finish", summary, time=time.time()), self._run), kind="summary"))

    def _send_news(self) -> None:
        for event in self._file.news() if self._file else ():
            if event.kind in self._kinds and event.kind not in OF_LAUNCHER:
                self._consider(event)

    def _consider(self, event: Event) -> None:
        while not self._overflow.empty():
            self._limits.leave_out(self._overflow.get())
        if self._limits.allow(event.kind, time.monotonic()):
            self._send(_alert(event, self._run, self._limits.summary()))

    def _send(self, alert: Alert) -> None:
        for number, channel in enumerate(self._channels):
            try:
                channel.send(alert)
                self._works[number] = True
            except NotSentError as error:
                if self._works[number]:
                    log.warning("an alert (%s) is not sent: %s; silent about further ones", alert.kind, error)
                self._works[number] = False


class EventsFile:
    """The events that are appended to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = path.stat().st_size if path.exists() else 0

    def news(self) -> list[Event]:
        """Events on the lines that are complete since the last call; none where the file cannot be read."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._read:  # it was replaced, as by logrotate
                    self._read = 0
                file.seek(self._read)
                complete, end, _ = file.read(MOST_NEWS).rpartition(b"\n")
        except OSError:
            return []
        self._read += len(complete) + len(end)
        return [event for line in complete.splitlines() if (event := event_of(line)) is not None]


def open_alerts(keys: AlertKeys, folder: Path | None, *, follow: bool) -> Alerts:
    """The alerts that the configuration asks for, none without a log folder.

    follow: also send what appears in the events file of `folder`. Raises UserError for a variable that is not set or
    holds no address.
    """
    channels: list[Channel] = []
    if folder is not None and keys.alert_webhook is not None:
        channels.append(Webhook(_address(keys.alert_webhook, os.environ), keys.alert_format))
    if folder is not None and keys.alert_command is not None:
        channels.append(Command(keys.alert_command))
    file = folder / EVENTS_FILE if folder is not None and follow else None
    return Alerts(channels, keys.alert_kinds, Limits(keys.alert_limit), str(folder and folder.resolve()), file)


def _address(variable: str, environment: Mapping[str, str]) -> str:
    address = environment.get(variable)
    if not address:
        raise UserError(f"alert_webhook ({variable}): this environment variable is not set; export the address in it")
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or not address.isprintable() or " " in address:
        raise UserError(f"alert_webhook ({variable}): this variable must hold an address, http://... or https://...")
    return address


def _alert(event: Event, run: str, summary: str = "") -> Alert:
    details = event.details
    if (size := len(json.dumps(details))) > LONGEST_DETAILS:
        details = {"left_out": f"{size:,} characters; they are in {EVENTS_FILE}"}
    text = "\n".join(filter(None, [_shortened(event.text), summary and f"({summary})"]))
    when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="seconds")
    return Alert(run, socket.gethostname(), event.kind, event.step, when, text, details)


def _shortened(text: str) -> str:
    """The beginning and the end of a long text: a failure begins with its rank and ends with its reason."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 4]}\n...\n{text[-LONGEST_TEXT * 3 // 4 :]}"
