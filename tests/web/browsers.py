"""A real headless Chromium, driven by Playwright. `python -m tests.web.browsers` gets one where
there is none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from playwright.async_api import Browser, BrowserContext, Page, async_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
OPTIONS = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
Scheme = Literal["light", "dark"]
SIZES = {1440: 900, 1280: 900, 1024: 768, 768: 1024, 640: 844, 390: 844, 320: 844}
"""The widths of a window, and their heights, in CSS pixels."""
SECOND = 1_000.0
PATIENCE = 30 * SECOND
"""Milliseconds for which a test waits for what a page shall show."""


def found() -> str | None:
    """The browser: the environment variable CHROMIUM, or one on PATH; None: Playwright's own, if it
    was downloaded.
    """
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A browser of its own. Without one it fails, and says what gets one."""
    async with async_playwright() as playwright:
        path = found() or playwright.chromium.executable_path
        assert Path(path).is_file(), (
            "this test needs Chromium: `make tools` gets it, or CHROMIUM names it"
        )
        started = await playwright.chromium.launch(
            executable_path=path,
            args=list(OPTIONS),
            chromium_sandbox=os.geteuid() != 0,
            env={**os.environ, "TMPDIR": "/tmp"},
        )
        try:
            yield started
        finally:
            await started.close()


class Errors(list[str]):
    """What pages have logged as an error, such as what their policy forbids, and what their scripts
    have raised.
    """

    def watch(self, context: BrowserContext) -> None:
        """Note the errors of all pages of a context."""
        context.on(
            "console",
            lambda message: self.append(message.text) if message.type == "error" else None,
        )
        context.on("weberror", lambda error: self.append(str(error.error)))


async def show_as(page: Page, width: int, scheme: Scheme) -> None:
    """Set the width of the window, and the colours that the person prefers."""
    await page.set_viewport_size({"width": width, "height": SIZES[width]})
    await page.emulate_media(color_scheme=scheme)


def get() -> None:
    """Get a browser where there is none: the system's package where we are root, or else
    Playwright's own.
    """
    if found() is not None:
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
        install = ["apt-get", "install", "-qq", "--no-install-recommends", "chromium"]
        subprocess.run(install, check=True, env=quiet, stdout=subprocess.DEVNULL)
    else:
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)


if __name__ == "__main__":
    get()
