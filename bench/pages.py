"""How long do the pages take, how many bytes are they, and how soon does a person see what happens?

    python bench/pages.py [--runs 1000000] [--requests 50] [--viewers 200] [--seconds 60]
                          [--kinds sqlite postgresql]

For each database a ledger is made as bench/api.py makes it, and one for Night as bench/night.py
makes it. A real `batch serve` on it is asked over loopback by one client, so the time of a page has
that of the client in it; the answer of /healthz is measured beside, in the same run. A headless
Chromium that has the files of the pages says when Night is painted, and how long it takes from a
key to the next frame.

A run writes a line into its log at intervals from 0 to 2 seconds. Two streams read it as the page
of the run does: from the process that executes it, and from another one on the same ledger.
Lateness is from a slot to the first line of its task, of 50 tasks that are due in each second,
without viewers and with so many viewers of that run.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import httpx
import night
from api import QUIET, STREAMS_OF_ONE, TASKS, TICKS, Served, fill, serving, spread, times
from machine import describe, print_table, version_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import start_server
from batch_system.web.live import LINGER_SECONDS
from tests.web.browsers import Errors, browser

BUSY = """
import asyncio
import random
import time
from batch_system import BaseTask, get_logger

logger = get_logger(__name__)

class Busy(BaseTask):
    name, schedule = "busy", None

    async def run(self):
        while True:
            logger.warning(f"mark {time.time()}")
            await asyncio.sleep(random.random() * 2)
"""
PAINTED = """
new Promise((resolve, reject) => {
  let largest;
  new PerformanceObserver((list) => (largest = list.getEntries().at(-1).startTime))
    .observe({ type: "largest-contentful-paint", buffered: true });
  setTimeout(() => {
    const [first] = performance.getEntriesByName("first-contentful-paint");
    if (first && largest) resolve([first.startTime, largest]);
    else reject(new Error("nothing was painted within a second"));
  }, 1000);
})
"""
DELAY = """
new Promise((resolve) => {
  const began = performance.now();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
  requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - began)));
})
"""
PAGE_MS, PAINT_MS = 50, 500
NIGHT_BYTES, FILES_BYTES = 40_000, 150_000
"""Of the page, and of the files that it needs once, packed."""
MARK = re.compile(rb"mark ([0-9.]+)")


@asynccontextmanager
async def signed_in(served: Served, token: int = 0) -> AsyncIterator[httpx.AsyncClient]:
    """A browser without a script, in which somebody has signed in with one of the tokens."""
    headers = {"Accept-Encoding": "gzip"}
    async with httpx.AsyncClient(
        base_url=served.url, headers=headers, timeout=60, trust_env=False
    ) as client:
        answer = await client.post("/signin", data={"secret": served.secrets[token], "next": "/"})
        assert answer.status_code == 303, answer.text[:500]
        yield client


async def size_of(client: httpx.AsyncClient, path: str) -> int:
    """The bytes of an answer's body on the wire."""
    async with client.stream("GET", path) as answer:
        assert answer.status_code == 200, path
        async for _ in answer.aiter_raw():
            pass
        return answer.num_bytes_downloaded


async def measure_pages(served: Served, number: int) -> list[list[str]]:
    """For each page but Night the milliseconds and its bytes."""
    async with signed_in(served) as client:
        runs = (await client.get("/runs?state=succeeded")).text
        found = re.search(r'id="r-([0-9a-f-]{36})"', runs)
        assert found is not None
        paths = {
            "Tasks": "/tasks",
            "a task": "/tasks/over-1",
            "Runs": "/runs",
            "Runs, failed": "/runs?state=failed",
            "a run": f"/runs/{found[1]}",
            "Backups": "/backups",
            "Nodes": "/nodes",
            "Changes": "/changes",
            "Search, a task": "/search?q=over-1",
        }
        plain = spread(await times(client, "/healthz", number))
        rows = [["/healthz", f"{plain[0]:.1f}", f"{plain[1]:.1f}", "", ""]]
        return [*rows, *[await _page(client, name, path, number) for name, path in paths.items()]]


async def measure_night(served: Served, number: int) -> list[list[str]]:
    """The same of Night, and the bytes of all files that it needs once."""
    async with signed_in(served) as client:
        since = [
            time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - days * 86_400 + 900))
            for days in (1, 31)
        ]
        rows = [
            await _page(client, "Night", "/", number, NIGHT_BYTES),
            await _page(client, "Night, 24 hours", f"/?since={since[0]}", number, NIGHT_BYTES),
            await _page(client, "Night, 31 days", f"/?since={since[1]}", number),
        ]
        html = (await client.get("/")).text
        files = sorted(set(re.findall(r'(?:href|src)="(/static/[^"]+)"', html)))
        style = next(file for file in files if file.endswith(".css"))
        files += [
            f"/static/{name}"
            for name in re.findall(r"url\(([^)]+)\)", (await client.get(style)).text)
        ]
        total = sum([await size_of(client, file) for file in sorted(set(files))])
        goal = f"< {FILES_BYTES:,} bytes: {_said(total < FILES_BYTES)}"
        return [*rows, [f"the {len(set(files))} files beside it, once", "", "", f"{total:,}", goal]]


async def _page(
    client: httpx.AsyncClient, name: str, path: str, number: int, most: int | None = None
) -> list[str]:
    await times(client, path, 3)
    middle, high = spread(await times(client, path, number))
    size = await size_of(client, path)
    goals = [f"p95 < {PAGE_MS}: {_said(high < PAGE_MS)}"]
    if most is not None:
        goals.append(f"< {most:,} bytes: {_said(size < most)}")
    return [name, f"{middle:.1f}", f"{high:.1f}", f"{size:,}", ", ".join(goals)]


def _said(is_held: bool) -> str:
    return "yes" if is_held else "NO"


async def measure_browser(served: Served) -> list[list[str]]:
    """When Night is painted for the first time and for the largest part, and a key's delay, in
    milliseconds.
    """
    async with browser() as chromium:
        page = await chromium.new_page()
        errors = Errors()
        errors.watch(page.context)
        await page.goto(f"{served.url}/signin")
        await page.get_by_label("Token").fill(served.secret)
        await page.get_by_role("button", name="Sign in").click()
        await page.wait_for_url(f"{served.url}/")
        first, largest, delays = [], [], []
        for _ in range(10):
            await page.goto(f"{served.url}/")
            painted = await page.evaluate(PAINTED)
            first.append(painted[0])
            largest.append(painted[1])
            delays.append(await page.evaluate(DELAY))
        assert errors == [], errors
    rows = {"first paint": first, "largest paint": largest, "key to frame": delays}
    goals = {"first paint": PAINT_MS, "largest paint": PAINT_MS}
    return [
        [
            name,
            f"{sorted(taken)[len(taken) // 2]:.0f}",
            f"{max(taken):.0f}",
            f"< {goals[name]}: {_said(max(taken) < goals[name])}" if name in goals else "",
        ]
        for name, taken in rows.items()
    ]


async def stream(client: httpx.AsyncClient, run: str, seen: list[float], seconds: float) -> None:
    """Read a run's page as it changes, and note how old each line of its log is when it comes."""
    give_up_at = time.time() + seconds
    place = re.search(r"after_line=([0-9.]+)", (await client.get(f"/runs/{run}")).text)
    assert place is not None
    async with client.stream(
        "GET", f"/live?topic=run:{run}&after_line={place[1]}", timeout=30
    ) as answer:
        assert answer.status_code == 200
        async for data in answer.aiter_bytes():
            now = time.time()
            seen += [now - float(mark[1]) for mark in MARK.finditer(data)]
            if now > give_up_at:
                return


async def start_busy(served: Served) -> str:
    """A run that writes lines; returns its id when it runs."""
    async with served.client() as client:
        run: str = (await client.post("/api/v1/tasks/busy/runs", json={})).json()["id"]
        while (await client.get(f"/api/v1/runs/{run}")).json()["state"] != "running":
            await asyncio.sleep(0.1)
        return run


async def measure_lines(own: Served, other: Served, run: str, seconds: float) -> list[list[str]]:
    """From writing a line to its coming with the stream, in seconds."""
    seen: dict[str, list[float]] = {"its own process": [], "another process": []}
    async with signed_in(own) as here, signed_in(other) as there:
        await asyncio.gather(
            *(
                stream(client, run, ages, seconds)
                for client, ages in zip((here, there), seen.values(), strict=True)
            )
        )
    rows = []
    for name, ages in seen.items():
        percent = quantiles(ages, n=100)
        goal = 1.0 if name == "its own process" else 2.0
        said = f"p95 < {goal:g}: {_said(percent[94] < goal)}"
        rows.append([name, f"{len(ages):,}", f"{percent[49]:.2f}", f"{percent[94]:.2f}", said])
    return rows


async def measure_viewers(served: Served, run: str, number: int, seconds: float) -> list[list[str]]:
    """The lateness of slots and the CPU of the process, without viewers and with so many of one
    run.
    """
    await asyncio.sleep(LINGER_SECONDS + 2)  # the streams before have ended by then
    without = await _phase(served, seconds)
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(signed_in(served, each // STREAMS_OF_ONE))
            for each in range(number)
        ]
        readers = [asyncio.create_task(stream(client, run, [], seconds + 60)) for client in clients]
        await asyncio.sleep(5)
        beside = await _phase(served, seconds)
        assert not any(reader.done() for reader in readers), "a stream has ended"
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    share, ratio = beside.share - without.share, beside.p99 / without.p99
    goals = f"{share:.1%} of a core more (< 20 %: {_said(share < 0.2)})"
    goals += f", p99 {ratio:.2f} times (<= 1.2: {_said(ratio <= 1.2)})"
    return [without.row("no viewer", ""), beside.row(f"{number} viewers", goals)]


class Phase(NamedTuple):
    """How late slots were, in seconds, and how much of a core the process took."""

    slots: int
    p50: float
    p99: float
    share: float

    def row(self, name: str, goals: str) -> list[str]:
        return [
            name,
            f"{self.slots:,}",
            f"{self.p50 * 1e3:.0f}",
            f"{self.p99 * 1e3:.0f}",
            f"{self.share:.1%}",
            goals,
        ]


async def _phase(served: Served, seconds: float) -> Phase:
    began, before = time.time(), served.seconds()
    await asyncio.sleep(seconds)
    share = (served.seconds() - before) / (time.time() - began)
    lines = (line.split() for line in (served.folder / "late").read_text().splitlines())
    late = [float(by) for at, by in lines if float(at) > began]
    percent = quantiles(late, n=100)
    return Phase(len(late), percent[49], percent[98], share)


async def measure(
    kind: str, url: str, ledger_url: str, night_url: str, options: argparse.Namespace
) -> None:
    """Make the ledgers, and measure all."""
    ledger = Database(ledger_url, setting="LEDGER_URL", pooled=False)
    await fill(ledger, options.runs)
    await ledger.dispose()
    ledger = Database(night_url, setting="LEDGER_URL", pooled=False)
    await migrate(ledger, LEDGER_HISTORY)
    await night.fill(ledger, options.runs, datetime.now(UTC).replace(second=0, microsecond=0))
    await night.tally(ledger)
    await ledger.dispose()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as another:
        own, other = Path(one), Path(another)
        head = ["", "p50, ms", "p95, ms", "bytes", "goal"]
        async with serving(own, url, ledger_url, QUIET) as served:
            rows = await measure_pages(served, options.requests)
            print_table(f"{kind}: pages, {options.runs:,} runs", [head, *rows])
        async with serving(
            own, url if night_url.startswith("sqlite") else night_url, night_url, QUIET
        ) as served:
            rows = await measure_night(served, options.requests)
            print_table(f"{kind}: Night, {options.runs:,} runs of slots", [head, *rows])
            painted = await measure_browser(served)
            print_table(f"{kind}: Chromium, ms", [["", "median", "highest", "goal"], *painted])
        async with (
            serving(own, url, ledger_url, BUSY + TASKS) as busy,
            serving(other, url, ledger_url, QUIET) as beside,
        ):
            run = await start_busy(busy)
            seen = await measure_lines(busy, beside, run, options.seconds)
            print_table(
                f"{kind}: a line of a log until it is seen, s",
                [["", "lines", "p50", "p95", "goal"], *seen],
            )
            viewers = await measure_viewers(busy, run, options.viewers, options.seconds)
            head = ["", "slots", "p50, ms", "p99, ms", "CPU", "goal"]
            print_table(f"{kind}: lateness of {TICKS} tasks a second", [head, *viewers])


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--viewers", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--kinds", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"]
    )
    options = parser.parse_args()
    describe(("starlette", "jinja2", "uvicorn", "sqlalchemy", "asyncpg", "aiosqlite"))
    with ExitStack() as stack:
        if "sqlite" in options.kinds:
            with tempfile.TemporaryDirectory() as folder:
                urls = (
                    f"sqlite+aiosqlite:///{folder}/{name}.db" for name in ("app", "ledger", "night")
                )
                await measure("SQLite", *urls, options)
        if "postgresql" in options.kinds:
            server = stack.enter_context(start_server(fast=False))
            url = await server.create_database()
            print(f"PostgreSQL {await version_of(url)}")
            await measure("PostgreSQL", url, url, await server.create_database(), options)


if __name__ == "__main__":
    asyncio.run(main())
