"""A headless Chromium over the W3C WebDriver protocol (https://www.w3.org/TR/webdriver2), which needs no package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
START_S, CALL_S = 30.0, 30.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""All servers here are on this machine; a proxy in the environment would not find them."""

VISIBLE_TEXT = """
function text(node) {
    if (node.nodeType === Node.TEXT_NODE) return node.data;
    if (node.nodeType !== Node.ELEMENT_NODE) return '';
    if (node.tagName === 'STYLE' || node.tagName === 'SCRIPT') return '';
    if (!node.checkVisibility({visibilityProperty: true, opacityProperty: true})) return '';
    const parts = [...(node.shadowRoot || node).childNodes].map(text);
    if (node.shadowRoot) parts.push(...[...node.childNodes].map(text));
    return parts.join(' ');
}
return text(document.body).replace(/\\s+/g, ' ');
"""
"""Text of the page, that below shadow roots included, which the WebDriver command for text leaves out."""


def missing_programs() -> list[str]:
    """Programs that :func:`browser` needs and this machine lacks."""
    return [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]


class Page:
    """One browser window."""

    def __init__(self, session_url: str) -> None:
        self._url = session_url

    def open(self, url: str) -> None:
        self._post("url", {"url": url})

    def script(self, body: str, *arguments: Any) -> Any:
        """What the JavaScript function body returns, as JSON."""
        return self._post("execute/sync", {"script": body, "args": list(arguments)})

    def text(self) -> str:
        return str(self.script(VISIBLE_TEXT))

    def wait_until(self, reached: Callable[[], Any], what: str, timeout_s: float) -> Any:
        """First true result of ``reached``, which is asked again and again.

        Raises:
            AssertionError: never; with the page's text.
        """
        deadline = time.monotonic() + timeout_s
        while not (result := reached()):
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"the page never came to {what} in {timeout_s:.0f} s; it shows: {self.text()[:2000]}"
                )
            time.sleep(0.1)
        return result

    def resize(self, width: int, height: int) -> None:
        """Make the visible part of the page that many pixels large."""
        frame = self.script("return [outerWidth - innerWidth, outerHeight - innerHeight]")
        self._post("window/rect", {"width": width + frame[0], "height": height + frame[1]})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(call("GET", f"{self._url}/screenshot")))

    def _post(self, command: str, body: dict[str, Any]) -> Any:
        return call("POST", f"{self._url}/{command}", body)


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[Page]:
    """A window of that many pixels; browser, driver and their files are gone afterwards."""
    port = free_port()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = ["chromedriver", f"--port={port}", f"--log-path={profile}/driver.log"]
        with served(command, f"http://127.0.0.1:{port}/status") as base:
            options = {
                "binary": shutil.which("chromium"),
                "args": [*FLAGS, f"--user-data-dir={profile}/profile", f"--window-size={width},{height}"],
            }
            wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
            session = call("POST", f"{base}/session", wanted)["sessionId"]
            yield Page(f"{base}/session/{session}")
            call("DELETE", f"{base}/session/{session}")


@contextlib.contextmanager
def served(command: list[str], ready_url: str, folder: Path | None = None) -> Iterator[str]:
    """Address, without path, of a server that was started for this and answers at ``ready_url``; nothing that it has
    started outlives this, not even the browser of a driver that crashed."""
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=folder, stdout=nothing, stderr=nothing, stdin=nothing, start_new_session=True
    )
    try:
        deadline = time.monotonic() + START_S
        while not _answers(ready_url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command[0]} did not answer at {ready_url} in {START_S:.0f} s")
            time.sleep(0.05)
        yield ready_url.rpartition("/")[0]
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    """The ``value`` of a WebDriver answer.

    Raises:
        AssertionError: the driver reports an error.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    try:
        with _DIRECT.open(request, timeout=CALL_S) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{method} {url}: {json.load(error)['value']['message']}") from error


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False
