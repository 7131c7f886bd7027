"""Pictures of the pages for the documentation, of the demonstration: `python -m
tests.pages.screenshots [FOLDER]`.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from tests.processes import BATCH, ROOT
from tests.web import browsers
from tests.web.browsers import Scheme, show_as

PICTURES = ROOT / "docs" / "pictures"
ZONE = "Europe/Berlin"
WIDE, NARROW = 1280, 390
START_SECONDS = 120.0
LINK = {"run": r"/runs/[0-9a-f-]{36}", "retry": r"/incidents/[0-9a-f-]{36}/retry"}
SHOTS: tuple[tuple[str, str, int, Scheme], ...] = (
    ("night", "/", WIDE, "light"),
    ("night-dark", "/", WIDE, "dark"),
    ("night-phone", "/", NARROW, "light"),
    ("retry", "retry", WIDE, "light"),
    ("tasks", "/tasks", WIDE, "light"),
    ("task", "/tasks/bank_statements", WIDE, "light"),
    ("run", "run", WIDE, "light"),
    ("backups", "/backups", WIDE, "light"),
)
"""The name of each picture, the page or where a link to it stands, the width, and the colours."""


async def main(pictures: Path) -> None:
    """Make the demonstration in a temporary folder, serve it, and photograph its pages."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        with (folder / "out").open("w") as out:
            command = (*BATCH, "demo", "--folder", str(folder / "demo"), "--port", "0")
            served = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
        try:
            url = await asyncio.to_thread(_address, folder / "out")
            async with browsers.browser() as chromium:
                page = await chromium.new_page()
                await page.context.add_cookies([{"name": "batch_zone", "value": ZONE, "url": url}])
                for name, path, width, scheme in SHOTS:
                    await show_as(page, width, scheme)
                    shown = (
                        path if path.startswith("/") else await asyncio.to_thread(_found, url, path)
                    )
                    await page.goto(url + shown)
                    await page.screenshot(path=pictures / f"{name}.png", full_page=True)
        finally:
            served.terminate()
            served.wait(60)


def _address(out: Path) -> str:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at:
        if (told := re.search(r"http://127\.0\.0\.1:\d+", out.read_text())) is not None:
            return told[0]
        time.sleep(0.2)
    raise SystemExit(f"the demonstration did not start:\n{out.read_text()}")


def _found(url: str, what: str) -> str:
    """The path of a running run, or of the retry of an incident."""
    page = "/runs?state=running" if what == "run" else "/"
    found = re.search(LINK[what], httpx.get(url + page, trust_env=False, timeout=30).text)
    assert found is not None, what
    return found[0]


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES))
