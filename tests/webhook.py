"""A server on this machine that alerts are sent to."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event

SECRET = "T0/B0/s3cr3t"


class Server(ThreadingHTTPServer):
    """Answers with the codes of `answers` in turn, then with 200, while it may; keeps the bodies."""

    def __init__(self, *answers: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.may_answer = list(answers), Event()
        self.may_answer.set()
        self.bodies: list[dict] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/services/{SECRET}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.may_answer.wait()
        code = self.server.answers.pop(0) if self.server.answers else 200
        if code == 200:
            self.server.bodies.append(body)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:  # where a redirection would lead
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass
