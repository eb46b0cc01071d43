"""The thread that answers HTTP."""

import socket
import threading
import time
from types import TracebackType

import uvicorn
from starlette.types import ASGIApp

LAST_ANSWERS_SECONDS = 5  # for clients to read the end of their answers


class HttpThread:
    """Serves an application on a listening socket until the context ends."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        """listener: closed at the end."""
        settings = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
        )
        self._server, self._listener = uvicorn.Server(settings), listener
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether requests are still answered."""
        return self._thread.is_alive()

    def __enter__(self) -> "HttpThread":
        self._thread.start()
        while self.is_alive and not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.should_exit = True
        self._thread.join(LAST_ANSWERS_SECONDS + 1)
