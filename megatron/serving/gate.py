"""What every request passes first: its key, the size of its body, the clock, the log."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron.serving.errors import ApiError
from megatron.serving.metrics import Metrics

log = logging.getLogger(__name__)

BODY_SECONDS = 30.0  # for a client to send its body
OPEN = ("/", "/health")  # need no key: they tell nothing of the model's work
QUIET = ("/health", "/metrics")  # asked every few seconds; the log has only their errors


class Gate:
    """An ASGI application around another one."""

    def __init__(
        self, app: ASGIApp, paths: Iterable[str], keys: Iterable[str], largest_body: int, metrics: Metrics
    ) -> None:
        """paths: of the application, the only ones that metrics and log name. keys: of clients; none: all may ask."""
        self._app, self._paths, self._metrics = app, frozenset(paths), metrics
        self._keys = [_digest(key.encode()) for key in keys]
        self._largest_body = largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), noted)
        except ApiError as error:
            await error.response(scope, receive, noted)
        finally:
            self._note(scope, status, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.observe_request(path, status, seconds)
        if status >= 400:
            self._metrics.observe_error(str(status))
        if status >= 400 or path not in QUIET:
            client = (scope.get("client") or ("unknown",))[0]
            log.info("%s %s %s: %d in %.3f s", client, scope["method"], path, status, seconds)

    def _check_key(self, scope: Scope) -> None:
        """Raise ApiError without a valid key. Takes the same time for all wrong keys."""
        if not self._keys or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        found = _digest(key.strip())
        matches = [hmac.compare_digest(found, known) for known in self._keys]
        if kind.lower() != b"bearer" or not any(matches):
            problem = "the key is not one of this server's" if given else "a key is missing"
            raise ApiError(401, f"{problem}; send it as Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ApiError for one that is too large, or does not come."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._largest_body:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client left before its body was complete")
                    body += message.get("body", b"")
                    if len(body) > self._largest_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s", code="timeout") from error

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._largest_body:,} bytes (serve_max_body)", code="too_large")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A channel that gives a body that has been read already, and then what `receive` gives."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return rest.pop() if rest else await receive()

    return replay


def _digest(key: bytes) -> bytes:
    """Of the same length for all keys, so that comparing takes the same time."""
    return hashlib.sha256(key).digest()
