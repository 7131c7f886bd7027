"""What people see of chains: the pages in a real browser, and the command line, of a service with
tasks that wait.

SCREENSHOTS names a folder for pictures of these pages.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page

from tests.batch.ledger_world import until
from tests.processes import Service, batch, service
from tests.web import browsers
from tests.web.browsers import show_as

TASKS = '''
from pathlib import Path

from batch_system import BaseTask, Start, Upstream, start, start_all


class Extract(BaseTask):
    """Fetch the sales of a day."""

    name, schedule = "extract", "0 3 * * *"

    async def run(self):
        if not Path("good").exists():
            raise ValueError("<b>the shop</b> does not answer")
        return 1


class Rates(BaseTask):
    """Fetch the rates of a day."""

    name, schedule = "rates", "0 3 * * *"

    async def run(self):
        return 1


class Load(BaseTask):
    """Load what was fetched."""

    name, after = "load", ("extract", "rates")

    async def run(self, upstream: Upstream):
        return "loaded"


class Report(BaseTask):
    """Report what was loaded."""

    name, after = "report", "load"

    async def run(self):
        return "reported"


class Mail(BaseTask):
    """Send one mail."""

    name, schedule, overlap = "mail", None, "allow"

    async def run(self, to: str):
        pass


class Summary(BaseTask):
    """The follow-up of the mails."""

    name, schedule = "summary", None

    async def run(self, upstream: Upstream):
        pass


class Newsletter(BaseTask):
    """Start mails for later, and one now."""

    name, schedule = "newsletter", None

    async def run(self):
        starts = [Start(Mail, to=name, delay=3_600) for name in ("ann", "bob")]
        await start_all([*starts, Start(Mail, to="cid")], then=Start(Summary))
'''
SETTINGS = {
    "POLL_SECONDS": "0.1",
    "HEARTBEAT_SECONDS": "0.3",
    "LEASE_SECONDS": "10",
    "DRAIN_SECONDS": "0.2",
}
SLOT = datetime.now(UTC).replace(hour=3, minute=0, second=0, microsecond=0) - timedelta(days=1)


@dataclass
class World:
    """A service in which yesterday's slot of extract has failed, and what comes after it was
    closed.
    """

    folder: Path
    service: Service

    async def batch(self, *words: str) -> str:
        done = await asyncio.to_thread(batch, self.folder, *words, settings=SETTINGS)
        return done.stdout + done.stderr

    async def json(self, *words: str) -> Any:
        done = await asyncio.to_thread(batch, self.folder, *words, "--json", settings=SETTINGS)
        return json.loads(done.stdout)

    async def run_of(self, task: str) -> dict[str, Any]:
        """The newest run of a task."""
        return dict((await self.json("runs", "--task", task))[0])

    async def settled(self, task: str, state: str) -> dict[str, Any]:
        async def is_so() -> dict[str, Any] | None:
            runs = await self.json("runs", "--task", task)
            return dict(runs[0]) if runs and runs[0]["state"] == state else None

        return dict(await until(is_so, 60))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    (tmp_path / "tasks").mkdir(exist_ok=True)
    (tmp_path / "tasks" / "sales.py").write_text(TASKS)
    started = service(tmp_path, settings=SETTINGS)
    running = await asyncio.to_thread(started.__enter__)
    try:
        found = World(tmp_path, running)
        _begin_earlier(tmp_path)
        days = ("--from", SLOT.isoformat(), "--to", SLOT.isoformat())
        await found.batch("backfill", "rates", *days)
        await found.batch("backfill", "extract", *days, "--and-after")
        await found.settled("report", "skipped")
        await found.batch("run", "newsletter", "--queue")
        await found.settled("summary", "waiting")
        yield found
    finally:
        await asyncio.to_thread(started.__exit__, None, None, None)


def _begin_earlier(folder: Path) -> None:
    """Let the schedules have begun yesterday, so that yesterday's slots are slots of theirs."""
    begin = f"{SLOT - timedelta(hours=1):%Y-%m-%d %H:%M:%S.%f}"
    _change(
        folder,
        f"UPDATE batch_schedules SET valid_from = '{begin}'",
        f"UPDATE batch_tasks SET accounted_from = '{begin}'",
    )


def _wait_once_more(folder: Path) -> None:
    """Let rates be tried again tomorrow, and load and report wait for ten minutes already."""
    now = datetime.now(UTC)
    ago, later = (f"{now + timedelta(minutes=m):%Y-%m-%d %H:%M:%S.%f}" for m in (-10, 1_440))
    waits = (
        f"state = 'waiting', due_at = '{ago}', wait_until = '{later}', reason = NULL, "
        "finished_at = NULL"
    )
    _change(
        folder,
        f"UPDATE batch_runs SET state = 'retrying', due_at = '{later}', finished_at = NULL "
        "WHERE task = 'rates'",
        f"UPDATE batch_runs SET {waits} WHERE task IN ('load', 'report')",
    )


def _change(folder: Path, *statements: str) -> None:
    (path,) = [each for each in folder.rglob("*.db") if "ledger" in each.name]
    with closing(sqlite3.connect(path, timeout=30)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


async def picture(page: Page, name: str) -> None:
    """Take a picture in light, in dark and as on a phone, if SCREENSHOTS is set."""
    if (folder := os.environ.get("SCREENSHOTS")) is None:
        return
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light")):
        await show_as(page, width, scheme)  # type: ignore[arg-type]
        await page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
    await show_as(page, 1280, "light")


async def words(page: Page, selector: str) -> str:
    return " ".join((await page.locator(selector).first.inner_text()).split())


async def test_pages_and_commands_say_what_waits_for_what(world: World) -> None:
    extract, load = await world.run_of("extract"), await world.run_of("load")
    async with browsers.browser() as chromium:
        page = await chromium.new_page()
        errors = browsers.Errors()
        errors.watch(page.context)
        await _sign_in(page, world)
        await _see_the_run(page, world, extract, load)
        await _see_the_task(page, world)
        await _see_night(page, world, extract)
        await _see_what_waits(page, world)
        await _read_the_commands(world, extract, load)
        await _see_what_is_blocked(page, world)
        assert errors == []


async def _see_what_is_blocked(page: Page, world: World) -> None:
    _wait_once_more(world.folder)
    await page.goto(f"{world.service.url}/")
    late = await words(page, "#late")
    assert "load waits for extract (failed)." in late
    assert "report waits for load (waiting), because of extract (failed)." in late
    await picture(page, "night-blocked")
    report = await world.run_of("report")
    await page.goto(f"{world.service.url}/runs/{report['id']}")
    assert "is waiting, because of extract (failed)." in await words(page, "main")
    await page.goto(f"{world.service.url}/runs?task=report&state=waiting")
    assert "waits for load (waiting), because of extract (failed)" in await words(page, "main")
    night = await world.batch("night")
    assert "extract (failed)" in night


async def _sign_in(page: Page, world: World) -> None:
    secret = (await world.json("token", "create", "ann", "--role", "admin"))["secret"]
    await page.goto(f"{world.service.url}/signin")
    await page.fill("input[name=secret]", secret)
    await page.click("button:has-text('Sign in')")
    await page.wait_for_url(f"{world.service.url}/")


async def _see_the_run(
    page: Page, world: World, extract: dict[str, Any], load: dict[str, Any]
) -> None:
    await page.goto(f"{world.service.url}/runs/{extract['id']}")
    assert await words(page, ".chain") == "extract failed → load skipped → report skipped"
    assert (
        "It keeps back 1 slot of load, 1 of report; a retry of this run lets them go on."
        in await words(page, "main")
    )
    await picture(page, "run-failed")
    await page.click(".chain >> text=load")
    assert page.url.endswith(f"/runs/{load['id']}")
    assert (
        await words(page, ".chain")
        == "extract failed, rates succeeded → load skipped → report skipped"
    )
    await picture(page, "run-skipped")
    await show_as(page, 390, "light")
    assert await page.evaluate("document.documentElement.scrollWidth") <= 390
    await show_as(page, 1280, "light")


async def _see_the_task(page: Page, world: World) -> None:
    await page.goto(f"{world.service.url}/tasks/load")
    chain = await words(page, ".dag")
    states = r"extract failed .*rates succeeded .*load skipped .*report skipped"
    assert re.search(states, chain), chain
    assert "It waits for the success of the slots of extract, rates" in await words(page, "main")
    await picture(page, "task")
    await page.goto(f"{world.service.url}/tasks/mail")
    assert "starts" in await words(page, "#upcoming")
    assert await page.locator("#upcoming li").count() == 2
    await picture(page, "task-upcoming")


async def _see_night(page: Page, world: World, extract: dict[str, Any]) -> None:
    await page.goto(
        f"{world.service.url}/?since={(SLOT - timedelta(hours=1)).isoformat().replace('+', '%2B')}"
    )
    assert (
        await words(page, "#needs .kept")
        == "Keeps back 1 slot of load, 1 of report. Its retry lets them go on."
    )
    assert "<b>the shop</b> does not answer" in await words(page, "#needs")
    closed = await words(page, "#did-not-run")
    assert (
        "After extract (failed) · 1 slot of load A retry of that run of extract lets it go on."
        in closed
    )
    assert "After extract (failed) · 1 slot of report" in closed
    await picture(page, "night")
    # The watch may have looked between the change of the schedules and the backfill, and found
    # slots unaccounted for.
    of_extract = [each for each in await world.json("incidents") if each["task"] == "extract"]
    incident = next(each for each in of_extract if each["kind"] == "failed")
    await page.goto(f"{world.service.url}/incidents/{incident['id']}")
    assert "Keeps back 1 slot of load, 1 of report" in await words(page, "main")
    await picture(page, "incident")


async def _see_what_waits(page: Page, world: World) -> None:
    await page.goto(f"{world.service.url}/runs?state=waiting")
    shown = await words(page, "main")
    assert "waits for 2 of 3 runs of its group" in shown
    assert shown.count("starts ") == 2
    await picture(page, "runs-waiting")
    summary = await world.run_of("summary")
    await page.goto(f"{world.service.url}/runs/{summary['id']}")
    assert await words(page, ".chain") == "mail succeeded, 2 × mail waiting → summary waiting"
    await picture(page, "run-waiting")


async def _read_the_commands(world: World, extract: dict[str, Any], load: dict[str, Any]) -> None:
    shown = await world.batch("show", extract["id"])
    assert "keeps back  1 slot of load, 1 of report" in " ".join(shown.split("\n")).replace(
        "   ", "  "
    )
    assert "[extract failed] -> load skipped -> report skipped" in shown
    assert "extract, rates: for a success, 1 d 00 h at most" in await world.batch("show", "load")
    waiting = await world.batch("runs", "--state", "waiting")
    assert "2 of 3 runs" in waiting
    summary = await world.run_of("summary")
    assert "for 2 of the 3 runs of its group" in await world.batch("show", summary["id"])
    mail = next(
        run for run in await world.json("runs", "--state", "waiting") if run["task"] == "mail"
    )
    assert "until 20" in await world.batch("show", mail["id"])
    night = await world.batch("night", "--since", SLOT.isoformat())
    assert "1 slot of load, 1 of report" in night
    assert (await world.json("show", load["id"]))["chain"]["before"][0]["links"][0][
        "task"
    ] == "extract"
