"""A headless Chromium, driven over its DevTools protocol: open a page, ask its DOM, picture it.

No driver and no download: Debian's `chromium` package and `websockets`, which Prefect brings.
"""

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

import pytest
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # CI runs as root, for whom Chromium has no sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-first-run",
    "--force-color-profile=srgb",
    # a mouse, as a person at a desk has: charts show their buttons to it only on hovering
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,"
    "availablePointerTypes=4",
    "--remote-debugging-port=0",  # a free one, which it writes into its profile folder
)


class Page:
    """One tab."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a DevTools method and return its result; events are passed over."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            said = json.loads(self._socket.recv(timeout=60))
            if said.get("id") == number:
                if "error" in said:
                    raise RuntimeError(f"{method}: {said['error']['message']}")
                return dict(said["result"])

    def open(self, url: str) -> None:
        """Open an address anew: nothing is left of the page before."""
        for where in ("about:blank", url):
            failed = self.call("Page.navigate", url=where).get("errorText")
            if failed:
                raise RuntimeError(f"{url} did not open: {failed}")
        self.wait("document.readyState === 'complete' && !!document.body", "a whole document")

    def ask(self, script: str) -> Any:
        """Return what a JavaScript expression comes to (a promise is waited for)."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", script))
        return found["result"].get("value")

    def wait(self, script: str, what: str, timeout_s: float = 60.0) -> Any:
        """Return what an expression comes to once it is true; fail if it never is."""
        end = time.monotonic() + timeout_s
        while not (found := self.ask(script)):
            if time.monotonic() > end:
                shown = self.ask("document.body ? document.body.innerText : ''")
                raise AssertionError(f"the page never showed {what}; it shows:\n{shown[:2000]}")
            time.sleep(0.2)
        return found

    def click(self, text: str, selector: str = "button, a, [role=tab], [role=menuitem]") -> None:
        """Click, as a mouse does, the last element matching `selector` whose text is `text`."""
        where = self.wait(
            f"(() => {{ const found = [...document.querySelectorAll({json.dumps(selector)})]"
            f".filter(e => e.innerText.trim() === {json.dumps(text)}).pop();"
            " if (!found) return null; found.scrollIntoViewIfNeeded();"
            " const r = found.getBoundingClientRect();"
            " return {x: r.x + r.width / 2, y: r.y + r.height / 2}; })()",
            f"{text!r} to click on",
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def picture(self, path: Path) -> None:
        """Save what is seen as a PNG of at most 256 colours, which screens of text need."""
        import io

        from PIL import Image

        raw = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@contextlib.contextmanager
def browser(width: int = 1400, height: int = 1000) -> Iterator[Page]:
    """Start Chromium with one tab; it and its profile are gone afterwards.

    Without Chromium the test is skipped on a person's machine and fails in CI.
    """
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        why = "no Chromium here (on Debian: apt install chromium)"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with connect(_tab(Path(profile), process), max_size=None) as socket:
                page = Page(socket)
                page.call("Page.enable")
                page.size(width, height)
                yield page
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _tab(profile: Path, process: subprocess.Popen[bytes], timeout_s: float = 60.0) -> str:
    """Return the address of the tab's socket once Chromium listens."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended with status {process.returncode}")
        with contextlib.suppress(OSError, ValueError, IndexError):
            port = int((profile / "DevToolsActivePort").read_text().splitlines()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                tabs = [t for t in json.load(answer) if t["type"] == "page"]
            return str(tabs[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise RuntimeError(f"Chromium did not listen within {timeout_s:.0f} s")
