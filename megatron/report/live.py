"""Serve a report on this machine alone; the page asks for news, which are read as they come."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from megatron.errors import UserError
from megatron.report.document import data, make_report, page
from megatron.report.run_folder import RunFolder, modified
from megatron.report.write import read_runs

ADDRESS = "127.0.0.1"
_NAMES = {ADDRESS, "localhost", "[::1]"}  # of a port that was forwarded as well; other sites cannot claim them


class Live:
    """The report as of now. It is made anew when files of its runs have changed."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        """Read nothing yet."""
        self._folders = folders
        self._lock = threading.Lock()
        self._version: object = None
        self._number = 0

    def current(self) -> tuple[str, bytes, str]:
        """The version, the data as JSON, and the page. Raises UserError if a run cannot be read."""
        with self._lock:
            version = [modified(folder.path) for folder in self._folders]
            if version != self._version:
                report = make_report(read_runs(self._folders, may_be_empty=True))
                self._data, self._page = data(report), page(report, live=True)
                self._version, self._number = version, self._number + 1
            return f'"{id(self)}-{self._number}"', self._data, self._page


class _Handler(BaseHTTPRequestHandler):
    """Answers / and /data."""

    live: Live
    timeout = 30  # seconds for a request to arrive

    def do_GET(self) -> None:
        """Answer a request of this machine."""
        host = self.headers.get("Host", "")
        if urlsplit(f"//{host}").netloc.rsplit(":", 1)[0] not in _NAMES:
            self._answer(HTTPStatus.FORBIDDEN, b"this report is for browsers on its own machine\n")
            return
        path = urlsplit(self.path).path
        if path not in ("/", "/data"):
            self._answer(HTTPStatus.NOT_FOUND, b"there are / and /data\n")
            return
        try:
            version, data, page = self.live.current()
        except UserError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n".encode())
            return
        if path == "/":
            self._answer(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8")
        elif self.headers.get("If-None-Match") == version:
            self._answer(HTTPStatus.NOT_MODIFIED, b"")
        else:
            self._answer(HTTPStatus.OK, data, "application/json", version)

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        with suppress(ConnectionError):  # the browser has left
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the terminal quiet."""


def make_server(folders: Sequence[RunFolder], port: int) -> ThreadingHTTPServer:
    """A server on loopback; port 0: a free one. Raises UserError if the port is taken."""
    handler = type("Handler", (_Handler,), {"live": Live(folders)})
    try:
        return ThreadingHTTPServer((ADDRESS, port), handler)
    except OSError as error:
        raise UserError(f"--port ({port}): {error.strerror}; --port 0 takes a free one") from error


def serve(folders: Sequence[RunFolder], port: int) -> None:
    """Serve until Ctrl-C. Raises UserError."""
    with make_server(folders, port) as server:
        print(f"serving at http://{ADDRESS}:{server.server_address[1]}; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
