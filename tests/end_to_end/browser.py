"""A headless Chromium, driven by its own protocol (https://chromedevtools.github.io/devtools-protocol) over pipes."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]


class Page:
    """One page."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        """Open an empty page. The descriptors are those of the browser's pipes."""
        self._to, self._from = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self._last, self._rest, self._session = 0, b"", None
        self.complaints: list[str] = []  # errors and warnings on the console, uncaught exceptions
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = self._from.read1(65536)
            assert piece, "the browser has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        told = message.get("params", {})
        complains = {
            "Runtime.exceptionThrown": True,
            "Runtime.consoleAPICalled": told.get("type") in ("error", "warning", "assert"),
            "Log.entryAdded": told.get("entry", {}).get("level") in ("error", "warning"),
        }
        if complains.get(message.get("method")):
            self.complaints.append(text.decode())
        return message

    def open(self, url: str) -> None:
        """Load a page, and wait until it is complete."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression holds."""
        deadline = time.monotonic() + PATIENCE
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"))
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, control: bool = False) -> None:
        """Press a key, such as Enter or Tab."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32, "ArrowLeft": 37, "ArrowRight": 39, "0": 48, "+": 187}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 if control else 0}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def _place(self, selector: str, across: float = 0.5) -> tuple[float, float]:
        """Where in the window an element is: `across` of its width from the left, in the middle of its height."""
        self.value(f"document.querySelector({selector!r}).scrollIntoView({{ block: 'center', behavior: 'instant' }})")
        rectangle = f"document.querySelector({selector!r}).getBoundingClientRect()"
        x, y = self.value(f"(r => [r.x + r.width * {across}, r.y + r.height / 2])({rectangle})")
        return x, y

    def hover(self, selector: str, across: float = 0.5) -> None:
        """Move the mouse onto an element."""
        x, y = self._place(selector, across)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, times: int = 1) -> None:
        """Click the middle of an element, once or twice in a row."""
        x, y = self._place(selector)
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def drag(self, selector: str, begin: float, end: float) -> None:
        """Drag the mouse over an element, from one part of its width to another."""
        for kind, across in (("mousePressed", begin), ("mouseMoved", (begin + end) / 2), ("mouseMoved", end)):
            x, y = self._place(selector, across)
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def show_as(self, width: int, height: int, scheme: str) -> None:
        """The size of the window, and whether the user prefers light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def printed(self) -> bytes:
        """The page as a PDF, on paper of A4."""
        sheet = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        return base64.b64decode(self.call("Page.printToPDF", **sheet)["data"])

    def screenshot(self, path: Path) -> None:
        """Write a picture of what is shown."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser with an empty page; its profile is in `folder`."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def take_pipes() -> None:  # the browser reads descriptor 3 and writes 4
        ends = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [str(PROGRAM), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"],
        preexec_fn=take_pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Page(to_browser[1], from_browser[0])
    finally:
        process.terminate()
        process.wait(PATIENCE)
