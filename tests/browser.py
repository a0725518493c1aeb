"""A headless Chrome or Chromium for tests, driven through its DevTools protocol: https://chromedevtools.github.io/devtools-protocol/"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_PATIENCE = 60.0  # seconds that the browser may take for one answer on a busy machine
_KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9}


def find_browser() -> str | None:
    """The path of a Chrome on this machine: $CHROME, or one of the usual names and places."""
    named = os.environ.get("CHROME")
    found = [named] if named else [*map(shutil.which, NAMES), *(place for place in PLACES if Path(place).exists())]
    return next(filter(None, found), None)


@contextlib.contextmanager
def open_browser(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu",
            "--disable-dev-shm-usage", "--disable-extensions", "--disable-background-networking", "--disable-sync",
            "--hide-scrollbars", "--force-color-profile=srgb",
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--no-sandbox")  # Chrome's own refuses to run as root; the pages are ours
        process = subprocess.Popen([program, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Browser(_address(Path(profile) / "DevToolsActivePort", process))
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(file: Path, process: subprocess.Popen) -> str:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"the browser ended with exit code {process.returncode}")
        if file.exists() and len(lines := file.read_text().splitlines()) == 2:
            return f"127.0.0.1:{lines[0]}"
        time.sleep(0.05)
    raise RuntimeError("the browser did not start")


class Browser:
    """Makes pages."""

    def __init__(self, address: str):
        self._address = address

    @contextlib.contextmanager
    def page(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator[Page]:
        """A page in a tab of its own, as soon as it says that it is ready."""
        request = urllib.request.Request(f"http://{self._address}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            target = json.load(answer)
        page = Page(websocket.create_connection(target["webSocketDebuggerUrl"], timeout=_PATIENCE, suppress_origin=True))
        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                page.call(f"{domain}.enable")
            page.resize(width, height)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            page.call("Emulation.setEmulatedMedia", features=[scheme])
            page.call("Page.navigate", url=url)
            page.wait("document.documentElement?.dataset.ready === 'yes'")
            yield page
        finally:
            page.socket.close()
            urllib.request.urlopen(f"http://{self._address}/json/close/{target['id']}", timeout=_PATIENCE).close()


class Page:
    """A tab: what it ran into is in `errors`, the addresses that it asked for in `requests`."""

    def __init__(self, socket: websocket.WebSocket):
        self.socket = socket
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol and its result."""
        number = next(self._numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        until = time.monotonic() + _PATIENCE
        while not self.evaluate(condition):
            if time.monotonic() > until:
                raise RuntimeError(f"still not: {condition}; errors: {self.errors}")
            time.sleep(0.03)

    def press(self, key: str) -> None:
        """A key, in whatever has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def point(self, x: float, y: float) -> None:
        """Moves the mouse there."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def resize(self, width: int, height: int) -> None:
        """CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """What is in view, or the whole page, as PNG."""
        Path(file).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        match message:
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                self.errors.append(details.get("exception", {}).get("description", details["text"]))
            case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "warning", "args": args}}:
                self.errors.append(str(args))
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error" | "warning", "text": text}}}:
                self.errors.append(text)
            case {"method": "Network.requestWillBeSent", "params": {"request": {"url": url}}}:
                self.requests.append(url)
