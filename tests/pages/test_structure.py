"""The structure of each page of the demonstration is as it is stored, so that no page changes
unseen.

`STRUCTURE=write pytest tests/pages/test_structure.py` stores it anew; look at the difference before
it is committed.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from batch_system import TaskRegistry, clock
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.config import get_settings
from batch_system.demo import files, making
from batch_system.demo.times import NOW
from batch_system.operations.asking.actor import Actor, Role
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations, open_operations
from batch_system.pages import backups, sign_in, system
from batch_system.pages.changes import changes
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.incidents import actions, listing, room
from batch_system.pages.night import left_slots, outage_backfills
from batch_system.pages.night.night import show_night
from batch_system.pages.runs import bulks, run_actions, runs
from batch_system.pages.search import search
from batch_system.pages.tasks import backfills, calendars, maintenance, start_form, task, tasks
from batch_system.verbs.incidents import ListIncidents
from tests.pages.outline import outline

STORED = Path(__file__).parent / "structure"
Show = Callable[[Request, Viewer], Awaitable[str]]


@dataclass
class Demo:
    """The demonstration at the end of its story; no service runs."""

    operations: Operations
    folder: Path

    async def page(
        self,
        show: Show,
        path: str,
        role: Role = "admin",
        zone: str = "Europe/Berlin",
        **given: str,
    ) -> str:
        """The HTML of a page, as somebody in this zone sees it."""
        actor = Actor("mara", role, "page")
        address, _, query = path.partition("?")
        scope: dict[str, Any] = {
            "type": "http",
            "method": "GET",
            "path": address,
            "root_path": "",
            "headers": [],
        }
        scope |= {"query_string": query.encode(), "path_params": given}
        viewer = Viewer(
            actor,
            self.operations.by(actor),
            zone_of(zone),
            "auto",
            "0",
            "",
            path,
            "http://localhost",
            NOW,
        )
        html = (await show(Request(scope), viewer)).replace(str(self.folder), "/srv/shop")
        # Python 3.13 marks the place in a line with other characters.
        html = re.sub(r"[~^]{3,}", "^^^", html)
        # The mark of a secret is another one each time.
        return re.sub(r"\*\*\* [0-9a-f]{16}", "*** and a mark", html)

    async def run(self, **conditions: str) -> str:
        """The newest run like that."""
        listed = await self.page(
            runs.show_runs, "/runs?" + "&".join(f"{k}={v}" for k, v in conditions.items())
        )
        found = re.search(r"/runs/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})", listed)
        assert found is not None, listed
        return found[1]

    async def incident(self, task: str) -> str:
        """The open incident of a task."""
        for each in (await self.operations(ListIncidents())).incidents:
            if each.task == task:
                return str(each.id)
        raise AssertionError(f"{task} has no incident")


@pytest.fixture(scope="module")
async def night(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Demo]:
    """What it shows first: without most of the ordinary runs that are older than the last night."""
    folder = tmp_path_factory.mktemp("demo")
    files.write(folder)
    await making.make_night(folder)
    TaskRegistry.clear()
    async with AsyncExitStack() as stack:
        with files.in_folder(folder):
            settings = get_settings()
            broken = load_tasks(settings.TASKS_DIR)
            loaded = Loaded(TaskRegistry.tasks(), broken)
            operations = await stack.enter_async_context(open_operations(settings, lambda: loaded))
            with clock.moved(NOW):
                yield Demo(operations, folder)


@pytest.fixture(scope="module")
async def demo(night: Demo) -> Demo:
    """All of it."""
    TaskRegistry.clear()
    await making.fill(night.folder)
    TaskRegistry.clear()
    return night


async def compare(name: str, html: str) -> None:
    file, shown = STORED / f"{name}.txt", outline(html)
    if os.environ.get("STRUCTURE") == "write":
        STORED.mkdir(exist_ok=True)
        file.write_text(shown)
    assert shown == file.read_text(), (
        f"the page {name} has another structure than the one that is stored"
    )


@pytest.mark.rest
@pytest.mark.parametrize(
    ("name", "show", "path", "given"),
    [
        ("night", show_night, "/", {}),
        ("night-month", show_night, "/?since=2026-10-11T18:00", {}),
        ("night-before", show_night, "/?since=2026-10-23T18:00&until=2026-10-24T08:00", {}),
        ("tasks", tasks.show_tasks, "/tasks", {}),
        ("tasks-attention", tasks.show_tasks, "/tasks?show=attention&group=tag&range=3", {}),
        ("task", task.show_task, "/tasks/bank_statements", {"task": "bank_statements"}),
        ("runs", runs.show_runs, "/runs", {}),
        ("runs-failed", runs.show_runs, "/runs?state=failed", {}),
        ("runs-none", runs.show_runs, "/runs?task=backup&state=retrying", {}),
        ("incidents", listing.show_incidents, "/incidents", {}),
        ("backups", backups.show_backups, "/backups", {}),
        ("nodes", system.show_nodes, "/nodes", {}),
        ("changes", changes.show_changes, "/changes", {}),
        ("calendars", calendars.show_calendars, "/calendars", {}),
        ("maintenance", maintenance.show_maintenance, "/maintenance", {}),
        ("maintenance-pause", maintenance.ask_to_pause, "/maintenance/pause", {}),
        ("search", search.show_search, "/search?q=invoice", {}),
        ("start", start_form.ask_to_start, "/tasks/invoice_pdf/start", {"task": "invoice_pdf"}),
        ("pause", tasks.ask_to_pause, "/tasks/orders_import/pause", {"task": "orders_import"}),
        (
            "backfill",
            backfills.ask_to_backfill,
            "/tasks/orders_import/backfill",
            {"task": "orders_import"},
        ),
        ("you", sign_in.show_you, "/you", {}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
async def test_a_page_is_as_it_is_stored(
    demo: Demo, name: str, show: Show, path: str, given: dict[str, str]
) -> None:
    await compare(name, await demo.page(show, path, **given))


@pytest.mark.rest
@pytest.mark.parametrize(
    ("name", "heading", "says"),
    [
        (
            "bank_statements",
            "bank_statements has been failing since Sat 23:00: 37 of its last 37 runs",
            "It began 11 min 56 s after a new version was deployed. Before it, ",
        ),
        (
            "cleanup_uploads",
            "cleanup_uploads is paused since Sat 18:12",
            "Paused by mara 14 h 30 min ago: “disk is being swapped, INC-311”.",
        ),
        ("warehouse_export", "warehouse_export is late since 07:15", "promised 08:00"),
        ("geo_cache", "geo_cache: its last 100 slots succeeded", "One run at a time; "),
        ("report_render", "report_render: its last run was cancelled, 05:14", "by jonas"),
    ],
)
async def test_the_page_of_a_task_begins_with_what_is_worst_about_it(
    demo: Demo, name: str, heading: str, says: str
) -> None:
    html = await demo.page(task.show_task, f"/tasks/{name}", role="viewer", task=name)
    assert f"<h1>{heading}</h1>" in html and says in unescape(html)
    assert not re.search(r'href="[^"]*/(start|pause|resume|backfill|mute|retry|acknowledge)"', html)


@pytest.mark.rest
async def test_night_and_tasks_are_small_before_they_are_packed(demo: Demo) -> None:
    night = await demo.page(show_night, "/", zone="UTC")
    assert len(night.encode()) <= 60_000
    few = await demo.page(tasks.show_tasks, "/tasks", zone="UTC")
    assert len(few.encode()) <= 120_000
    assert few.count('<div class="lane">') == 12
    every = await demo.page(tasks.show_tasks, "/tasks?lanes=all")
    assert every.count('<div class="lane">') == 45


@pytest.mark.rest
async def test_night_is_for_a_viewer_as_it_is_stored(demo: Demo) -> None:
    await compare("night-viewer", await demo.page(show_night, "/", role="viewer"))


async def test_a_viewer_sees_no_button_that_changes_something(night: Demo) -> None:
    html = await night.page(show_night, "/", role="viewer")
    assert "bank_statements" in html
    assert "/retry" not in html and "/acknowledge" not in html


async def test_an_outage_of_several_tasks_is_backfilled_or_left_from_its_row(night: Demo) -> None:
    html = await night.page(show_night, "/")
    found = [
        re.search(rf'href="({path}[^"]+)"', html) for path in (r"/backfill\?", r"/slots/leave\?")
    ]
    backfill, leave = (unescape(each[1]) for each in found if each is not None)
    html = await night.page(outage_backfills.ask, backfill)
    assert "This will create 11 runs." in html and "Create 11 runs</button>" in html
    assert all(
        f">{task}</a>" in html for task in ("session_sweep", "price_check", "bank_statements")
    )
    assert "Leave 11 slots as they are?" in await night.page(left_slots.ask_to_leave, leave)


async def test_skipped_slots_are_retried_from_their_row(night: Demo) -> None:
    html = await night.page(show_night, "/")
    found = re.search(r'href="(/runs/bulk/retry\?[^"]+)">(?:<i [^>]*></i>)?Retry 4…', html)
    assert found is not None
    html = await night.page(partial(bulks.ask, "retry"), unescape(found[1]))
    assert "Retry 4 runs?" in html and "<dd>task thumbnails, state skipped" in html


async def test_a_bulk_says_before_how_many_runs_of_each_task_it_changes(night: Demo) -> None:
    html = await night.page(partial(bulks.ask, "retry"), "/runs/bulk/retry?state=failed")
    found = re.search(r"Retry (\d+) runs\?.*<dt>Tasks</dt><dd>([^<]+)</dd>", html, re.DOTALL)
    assert found is not None
    numbers = [int(each.split(" of ")[0]) for each in found[2].split(", ")]
    assert len(numbers) > 1 and sum(numbers) == int(found[1])


@pytest.mark.parametrize("state", ["failed", "running", "succeeded"])
async def test_a_run_is_as_it_is_stored(night: Demo, state: str) -> None:
    run = await night.run(state=state)
    await compare(f"run-{state}", await night.page(runs.show_run, f"/runs/{run}", run=run))


@pytest.mark.parametrize(
    ("name", "show"),
    [
        ("retry", actions.ask_to_retry),
        ("acknowledge", actions.ask_to_acknowledge),
    ],
)
async def test_what_is_asked_about_an_incident_is_as_it_is_stored(
    night: Demo, name: str, show: Show
) -> None:
    incident = await night.incident("bank_statements")
    await compare(name, await night.page(show, f"/incidents/{incident}/{name}", incident=incident))


@pytest.mark.parametrize(("name", "show"), [("cancel", run_actions.ask_to_cancel)])
async def test_what_is_asked_about_a_run_is_as_it_is_stored(
    night: Demo, name: str, show: Show
) -> None:
    run = await night.run(state="running")
    await compare(name, await night.page(show, f"/runs/{run}/{name}", run=run))


@pytest.mark.rest
@pytest.mark.parametrize("task", ["bank_statements", "warehouse_export"])
async def test_the_structure_of_an_incident_is_as_it_is_stored(demo: Demo, task: str) -> None:
    incident = await demo.incident(task)
    html = await demo.page(room.show_incident, f"/incidents/{incident}", incident=incident)
    await compare(f"incident-{task}", html)
