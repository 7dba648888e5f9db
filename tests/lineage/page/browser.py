"""A real headless Chromium by the DevTools protocol: open a page, ask it, use mouse and keys, hear what it complains about."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 30
_COMPLAINTS = (
    "Runtime.exceptionThrown",
    "Log.entryAdded",
    "Runtime.consoleAPICalled",
    "Network.requestWillBeSent",
)


def chromium() -> str | None:
    """$FOREBAY_CHROMIUM, else the first browser on the PATH."""
    return os.environ.get("FOREBAY_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """One open page. `events` are all that the browser told, in order."""

    def __init__(self, socket: ClientConnection, session: str) -> None:
        self._socket, self._session, self._ids = socket, session, count(1000)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        self._socket.send(
            json.dumps({"id": number, "sessionId": self._session, "method": method, "params": params})
        )
        return self._until(lambda told: told.get("id") == number)["result"]

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def open(self, path: Path, width: int = 1280, height: int = 1000, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.look(width, height, dark)
        self.call("Page.navigate", url=path.as_uri())
        self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def look(self, width: int, height: int, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def middle_of(self, selector: str) -> tuple[float, float]:
        """Scroll an element into view and return its middle in the window."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"{box}.scrollIntoView({{block: 'center'}})")
        return tuple(
            self.ask(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box}.getBoundingClientRect())")
        )

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, selector: str) -> None:
        x, y = self.middle_of(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x, y, button="left", clickCount=1)

    def press(self, key: str, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                text=text if kind == "keyDown" else "",
                windowsVirtualKeyCode=_CODES.get(key, 0),
            )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """Errors, warnings, whatever the console was given, and violations of the content policy."""
        return [e for e in self.events if e["method"] in _COMPLAINTS[:3]]

    @property
    def requests(self) -> list[str]:
        """Every address that the page asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == _COMPLAINTS[3]]

    def _until(self, found: Any) -> dict[str, Any]:
        while True:
            told = json.loads(self._socket.recv(timeout=_SECONDS))
            if "method" in told:
                self.events.append(told)
            assert "error" not in told, told
            if found(told):
                return told


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start Chromium with an empty profile in `folder`, without a network, and give its only page."""
    name = chromium()
    assert name is not None
    command = [
        name, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
        "--disable-extensions", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--proxy-server=127.0.0.1:9", "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with connect(_address(folder, process), max_size=None, proxy=None) as socket:
            yield _attached(socket)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(folder: Path, process: subprocess.Popen[bytes]) -> str:
    file, end = folder / "DevToolsActivePort", time.monotonic() + _SECONDS
    while time.monotonic() < end and process.poll() is None:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise AssertionError("Chromium did not start.")


def _attached(socket: ClientConnection) -> Page:
    def call(number: int, method: str, **params: Any) -> dict[str, Any]:
        socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            told = json.loads(socket.recv(timeout=_SECONDS))
            if told.get("id") == number:
                return told["result"]

    target = next(t for t in call(1, "Target.getTargets")["targetInfos"] if t["type"] == "page")
    session = call(2, "Target.attachToTarget", targetId=target["targetId"], flatten=True)
    return Page(socket, session["sessionId"])


_CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "Home": 36, "ArrowLeft": 37}
