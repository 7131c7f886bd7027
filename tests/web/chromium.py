"""A headless Chromium, driven by its DevTools protocol. It is found on PATH and never installed."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
START_SECONDS = 60.0
LARGEST_MESSAGE = 50_000_000


class Page:
    """A page of the browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        """What the page has logged as an error, such as what its policy forbids."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser, and return its answer."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=START_SECONDS))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        if message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(message["params"]["entry"]["text"])
        if message["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]["exceptionDetails"]))

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> None:
        """Wait until a JavaScript expression is true. It may fail before, while a page is loaded."""
        give_up_at = time.monotonic() + seconds
        while not self._value_or_none(expression):
            assert time.monotonic() < give_up_at, (
                f"{expression}\n{self.errors}\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.02)

    def _value_or_none(self, expression: str) -> Any:
        try:
            return self.value(expression)
        except AssertionError:
            return None

    def open(self, url: str) -> None:
        """Go to an address, and wait until its page is there."""
        self.ask("Page.navigate", url="about:blank")  # another fragment alone would load no page
        self.until("location.href === 'about:blank'")
        self.ask("Page.navigate", url=url)
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def press(self, key: str, code: int) -> None:
        """Press and release a key, as a person does who uses no mouse."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def type(self, text: str) -> None:
        """Type text into what has the focus."""
        self.ask("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of an element."""
        place = self.value(
            f"(e => {{ e.scrollIntoView(); const r = e.getBoundingClientRect();"
            f" return [r.x + r.width / 2, r.y + r.height / 2]; }})(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def show_as(self, width: int, scheme: str) -> None:
        """Set the width of the window, and the colours that the person prefers: "light" or "dark"."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def photograph(self, file: Path) -> None:
        """Write the whole page as a PNG."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a new browser, which keeps its files in `folder`."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise AssertionError(
            f"this test needs a browser, and none of {', '.join(NAMES)} is on PATH: install Chromium "
            "(on Debian: apt-get install chromium)"
        )
    options = ["--headless=new", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}/profile", "--disable-dev-shm-usage"]
    options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    # Chromium has a socket in the folder for temporary files. The path of a socket has 107 bytes at most.
    with TemporaryDirectory(dir="/tmp") as short, (folder / "chromium.log").open("wb") as log:
        command, environment = [path, *options, "about:blank"], {**os.environ, "TMPDIR": short}
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            with connect(_address(running, folder), max_size=LARGEST_MESSAGE, proxy=None) as socket:
                yield Page(socket)
        finally:
            running.kill()
            running.wait()


def _address(running: subprocess.Popen[bytes], folder: Path) -> str:
    """The address at which the browser's first page is driven."""
    told = folder / "profile/DevToolsActivePort"
    give_up_at = time.monotonic() + START_SECONDS
    while True:
        assert running.poll() is None and time.monotonic() < give_up_at, (folder / "chromium.log").read_text()
        if told.exists() and len(lines := told.read_text().split()) == 2:
            break
        time.sleep(0.02)
    with connect(f"ws://127.0.0.1:{lines[0]}{lines[1]}", proxy=None) as socket:
        while True:
            socket.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            pages = [t for t in json.loads(socket.recv())["result"]["targetInfos"] if t["type"] == "page"]
            if pages:
                return f"ws://127.0.0.1:{lines[0]}/devtools/page/{pages[0]['targetId']}"
            assert time.monotonic() < give_up_at, "the browser has no page"
            time.sleep(0.02)
