"""Headless Chromium, driven over WebDriver (https://www.w3.org/TR/webdriver2/): enough of it for the page's tests."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import prepared
from peers import held_port

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium")

MISSING = "" if DRIVER and CHROMIUM else "no chromium and chromedriver on the PATH (Debian: chromium, chromium-driver)"

_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_WITHIN_S = 60.0


class Browser:
    """One window. Its texts are what a user reads."""

    def __init__(self, address: str) -> None:
        self._address = address

    def open(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        self._ask("url", {"url": url})

    def run(self, script: str, *arguments: object) -> Any:
        """Value that a function body returns, in the page."""
        return self._ask("execute/sync", {"script": script, "args": arguments})

    def wait(self, condition: str, *arguments: object) -> Any:
        """Value of an expression, once it is true. Raises AssertionError: it never was."""
        until = time.monotonic() + _WITHIN_S
        while not (found := self.run(f"return {condition}", *arguments)):
            assert time.monotonic() < until, f"{condition} is not true; the page says:\n{self.text('body')}"
            time.sleep(0.05)  # between two looks: the page tells nobody of a change
        return found

    def text(self, selector: str) -> str:
        """Text of the first element."""
        found: str = self.run("return document.querySelector(arguments[0]).innerText", selector)
        return found

    def press(self, keys: str) -> None:
        """Press keys, where the focus is. Tab, Enter, ... are characters of WebDriver's: U+E004, U+E007."""
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def messages(self) -> list[str]:
        """Lines that the page has logged since the last look: errors, and whatever was blocked."""
        lines = [entry["message"] for entry in self._ask("se/log", {"type": "browser"})]
        return [line for line in lines if not line.startswith("chrome://")]  # of the tab that it begins with

    def look(self, width: int, height: int, *, dark: bool) -> bytes:
        """A picture of the whole page as PNG, as a screen of that size shows it."""
        media = {"media": "", "features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self._devtools("Emulation.setEmulatedMedia", media)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._devtools("Emulation.setDeviceMetricsOverride", metrics)
        taken = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True})
        return base64.b64decode(taken["data"])

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._ask("goog/cdp/execute", {"cmd": command, "params": parameters})

    def _ask(self, command: str, parameters: dict[str, Any]) -> Any:
        return _post(f"{self._address}/{command}", parameters)


def _post(url: str, document: object, method: str = "POST") -> Any:
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json"})
    request.method = method
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.read().decode()}") from None


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a new profile in a folder. Skips the test where it does not start, as in some containers."""
    # It has a socket where TMPDIR says, whose path has room for 107 bytes, and leaves files there.
    with (
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as leftovers,
        _driver(leftovers) as address,
    ):
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            session = f"{address}/{_post(address, {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"
        except (AssertionError, OSError) as error:
            pytest.skip(f"Chromium does not start here: {error}")
        try:
            yield Browser(session)
        finally:
            _post(session, {}, "DELETE")


@contextmanager
def _driver(folder: str) -> Iterator[str]:
    """A driver of browsers with a folder for what they do not keep. Yields the address where it makes sessions."""
    assert DRIVER is not None
    port = held_port()  # where there is no IPv6, it does not say which one it has chosen
    driver = subprocess.Popen(
        [DRIVER, f"--port={port.getsockname()[1]}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": folder},
        preexec_fn=prepared.end_with_parent,
    )
    assert driver.stdout is not None
    try:
        for line in driver.stdout:
            if "was started successfully on port " in line:
                break
        yield f"http://127.0.0.1:{port.getsockname()[1]}/session"
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
        port.close()
