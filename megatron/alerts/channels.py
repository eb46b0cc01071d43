"""Where alerts go: a webhook or a command. Each has a time limit. Standard library only.

No message of this file shows the address of the webhook, whose path is often a secret.
"""

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

ANSWER_SECONDS = 5.0
COMMAND_SECONDS = 30.0
PAUSES = (1.0, 2.0)  # seconds before the second and the third attempt


@dataclass(frozen=True)
class Alert:
    """What is sent. run: its log folder. host: that sends. time: ISO 8601, UTC."""

    run: str
    host: str
    kind: str
    step: int | None
    time: str
    text: str
    details: dict[str, Any]


class NotSentError(Exception):
    """An alert that did not get through, and why."""


class Channel(Protocol):
    """A way to send alerts."""

    def send(self, alert: Alert) -> None:
        """Send one alert. Raises NotSentError."""


class Webhook:
    """Posts each alert as JSON. An answer of 2xx is a success; other answers of the server's are tried again."""

    def __init__(self, address: str, form: str) -> None:
        """address: http or https. form: "json", or "slack" for {"text": ...}."""
        self._address, self._form = address, form
        self._name = f"the webhook at {urlsplit(address).hostname}"

    def send(self, alert: Alert) -> None:
        """As `Channel`."""
        body = {"text": as_slack(alert)} if self._form == "slack" else asdict(alert)
        request = Request(
            self._address, json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "deepy"}
        )
        for pause in (*PAUSES, None):
            problem, may_pass = self._attempt(request)
            if problem is None:
                return
            if pause is None or not may_pass:
                raise NotSentError(f"{self._name} {problem}")
            time.sleep(pause)

    def _attempt(self, request: Request) -> tuple[str | None, bool]:
        """What went wrong, and whether it may be different the next time."""
        try:
            with build_opener(_NoRedirects).open(request, timeout=ANSWER_SECONDS):
                return None, False
        except HTTPError as error:
            error.close()
            return f"answered {error.code}", error.code >= 500 or error.code == 429
        except TimeoutError:
            return f"did not answer within {ANSWER_SECONDS:.0f} s", True
        except URLError as error:
            return f"cannot be reached: {error.reason}", True
        except (OSError, HTTPException, ValueError) as error:  # a broken answer, or a port that is none
            return f"cannot be used: {type(error).__name__}", False


class _NoRedirects(HTTPRedirectHandler):
    """A redirected POST would become a GET without the alert."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse: the redirection is an answer like any other."""


class Command:
    """Runs a shell command for each alert: the alert as JSON on its standard input, kind and text in variables."""

    def __init__(self, command: str) -> None:
        self._command = command

    def send(self, alert: Alert) -> None:
        """As `Channel`."""
        variables = {"DEEPY_ALERT_KIND": alert.kind, "DEEPY_ALERT_TEXT": alert.text.replace("\0", "")}
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=os.environ | variables,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise NotSentError(f"alert_command cannot be started: {error}") from error
        try:
            _, errors = process.communicate(json.dumps(asdict(alert)).encode(), COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise NotSentError(f"alert_command did not end within {COMMAND_SECONDS:.0f} s, and was killed") from None
        if process.returncode:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise NotSentError(f"alert_command ended with code {process.returncode}" + (f": {last}" if last else ""))


def as_slack(alert: Alert) -> str:
    """The text of a message in Slack's markup, which other chats read too."""
    step = "" if alert.step is None else f" at step {alert.step:,}"
    head = f"*{alert.kind}*{step} in {_escaped(alert.run)} on {_escaped(alert.host)}"
    text = _escaped(alert.text)
    return f"{head}\n```{text}```" if "\n" in text else f"{head}: {text}"


def _escaped(text: str) -> str:
    """With the three characters escaped that Slack's markup reserves."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
