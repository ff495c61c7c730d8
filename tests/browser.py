"""A real browser for tests: headless Chromium, driven by playwright, on pages served from a folder on loopback.

Nothing but that server can be reached: a request to anywhere else is refused and noted, so that a page that needs the
network fails its test. Where playwright or a Chromium is missing, `browsing` skips the test and says which.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

#: Names under which systems install Chromium.
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass
class Browsing:
    """An open browser: `page` (playwright's Page), the served folder's `url`, and what went wrong so far.

    `console_errors` are console errors, warnings excluded, and uncaught exceptions; `refused` are the addresses
    outside `url` that the page asked for.
    """

    page: Any
    url: str
    console_errors: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@contextmanager
def browsing(folder: Path, *, color_scheme: str = "light", width: int = 1280, height: int = 900) -> Iterator[Browsing]:
    """Serve `folder` and open a blank page beside it: go to f"{browsing.url}/file.html" with `page.goto`."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(CHROMIUM)} on the path")
    with serving(folder) as url, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        context = browser.new_context(color_scheme=color_scheme, viewport={"width": width, "height": height})
        opened = Browsing(context.new_page(), url)
        _watch(opened)
        try:
            yield opened
        finally:
            context.close()
            browser.close()


def _watch(opened: Browsing) -> None:
    """Note errors, and refuse all requests to elsewhere."""

    def answer(route: Any) -> None:
        if route.request.url.startswith((opened.url, "data:", "blob:")):
            route.continue_()
        else:
            opened.refused.append(route.request.url)
            route.abort()

    def listen(message: Any) -> None:
        if message.type == "error":
            opened.console_errors.append(message.text)

    opened.page.on("console", listen)
    opened.page.on("pageerror", lambda error: opened.console_errors.append(str(error)))
    opened.page.context.route("**/*", answer)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder's files on loopback and yield the server's address, http://127.0.0.1:PORT."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
