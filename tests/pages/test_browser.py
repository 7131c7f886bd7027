"""The pages in a real Chromium, of two real processes on one ledger, on both databases."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, Locator, Page, Request, Route, expect

from batch_system.testing.postgres import PostgresServer
from tests.kinds import KINDS
from tests.pages.site import Site, serve, until
from tests.web import browsers
from tests.web.browsers import PATIENCE, Errors, Scheme, show_as

expect.set_options(timeout=PATIENCE)
FAILED = 12
AMOUNTS = re.compile(
    r"([0-9,]+) (succeeded|failed|cancelled|missed|paused|skipped|still going on|unaccounted)"
)
DUE = re.compile(r"([0-9,]+) slots? (?:was|were)? ?due")
EXTRA = pytest.mark.nightly
ADDRESSES = (
    *(
        "/",
        "/tasks",
        "/tasks?text=none",
        "/tasks/orders",
        "/tasks/none",
        "/files/broken?source=tasks%2Fbroken.py",
        "/incidents",
        "/runs",
        "/runs?state=failed",
    ),
    *(
        "/backups",
        "/nodes",
        "/changes",
        "/you",
        "/search?q=orders",
        "/tasks/orders/start",
        "/tasks/orders/pause",
    ),
    *("/tasks/tick/backfill", "/runs/bulk/retry?state=failed", f"/tasks/wide_{'w' * 92}/keys"),
)
"""Of pages, and of pages that ask before something is done."""


@pytest.fixture(scope="module")
async def chromium() -> AsyncIterator[Browser]:
    async with browsers.browser() as started:
        yield started


@pytest.fixture(scope="module", params=KINDS)
async def site(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    postgres_server: PostgresServer,
) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp(request.param)
    application = ledger = f"sqlite+aiosqlite:///{folder}"
    application, ledger = f"{application}/app.db", f"{ledger}/ledger.db"
    if request.param == "postgresql":
        application = ledger = await postgres_server.create_database()
    async with serve(folder, application, ledger) as site:
        yield site


@pytest.fixture
def errors() -> Errors:
    """What the pages of this test have logged as errors. It has to be empty when the test ends."""
    return Errors()


@pytest.fixture
async def context(site: Site, chromium: Browser, errors: Errors) -> AsyncIterator[BrowserContext]:
    """A browser in which ann has signed in. It fails if a page logs an error, such as what its
    policy forbids.
    """
    context = await chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    errors.watch(context)
    answer = await context.request.post(
        f"{site.url}/signin", form={"secret": site.secret, "next": "/"}
    )
    assert answer.ok
    yield context
    await context.close()
    assert errors == []


@pytest.fixture
async def page(context: BrowserContext) -> Page:
    return await context.new_page()


async def fail(site: Site, number: int = FAILED) -> None:
    """So many runs of orders fail, and wait for a person."""
    (site.folder / "good").unlink(missing_ok=True)
    runs = [await site.start("orders", day=day) for day in range(number)]
    for run in runs:
        assert (await site.ended(run))["state"] == "failed"


def row_of(page: Page, task: str) -> Any:
    """What Night says about a task that needs a person."""
    return page.locator("article.pb", has=page.get_by_role("link", name=task, exact=True))


@pytest.mark.rest
async def test_night_adds_up_and_failures_are_retried_by_a_trial(site: Site, page: Page) -> None:
    await fail(site)
    await page.goto(site.url)
    row = row_of(page, "orders")
    await expect(row).to_contain_text(f"{FAILED} runs failed")
    await expect(row).to_contain_text("<b>no customer</b> with this number")
    sentence = await page.locator(".v-s").inner_text()
    amounts = {word: int(number.replace(",", "")) for number, word in AMOUNTS.findall(sentence)}
    due = DUE.search(sentence)
    assert due is not None and int(due[1].replace(",", "")) == sum(amounts.values()), sentence
    assert amounts["unaccounted"] == 0 and amounts["succeeded"] > 0

    (site.folder / "good").touch()
    await row.get_by_role("link", name=f"Retry all {FAILED}").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text(f"Retry all {FAILED} runs of orders?")
    await expect(dialog.get_by_role("link", name="Leave them")).to_be_focused()
    await expect(dialog.get_by_role("radio", name="The newest one first")).to_be_checked()
    await dialog.get_by_role("button", name="Retry").click()
    await page.wait_for_url(re.compile(r"/runs/"))
    await expect(page.locator("#p-head")).to_contain_text("Succeeded")

    await page.goto(site.url)
    await row.get_by_role("link", name=f"Retry the other {FAILED - 1}").click()
    await dialog.get_by_role("radio", name=f"All {FAILED - 1} runs").check()
    await dialog.get_by_role("button", name="Retry").click()
    await page.wait_for_url(re.compile(r"/bulks/"))
    await expect(page.locator("#bulk")).to_contain_text("Done")
    await page.goto(site.url)
    await expect(page.locator("#verdict")).to_be_visible()
    await expect(row).to_have_count(0)


@pytest.mark.rest
async def test_a_failure_is_acknowledged_and_comes_back(site: Site, page: Page) -> None:
    await fail(site, 2)
    await page.goto(site.url)
    row = row_of(page, "orders")
    await row.get_by_role("link", name="Acknowledge").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("What is done about it").fill("The shop knows it.")
    await dialog.get_by_role("button", name="Acknowledge").click()
    await expect(row).to_have_count(0)
    fold = page.locator("details.dealt")
    await fold.locator("summary").click()
    await expect(fold).to_contain_text("The shop knows it.")
    await fail(site, 1)  # live: nobody reloads the page
    await expect(row).to_contain_text("1 run failed")
    (site.folder / "good").touch()
    run = await site.start("orders", day=0)
    assert (await site.ended(run))["state"] == "succeeded"
    await expect(row).to_have_count(0)
    await expect(page.locator("#left")).to_contain_text("orders made good")


@pytest.mark.rest
async def test_the_bar_and_the_log_of_a_run_move_until_it_is_cancelled(
    site: Site, page: Page
) -> None:
    run = await site.start("long")
    await page.goto(f"{site.nodes[1].url}/signin")  # the other process shows the same
    await page.get_by_label("Token").fill(site.secret)
    await page.get_by_role("button", name="Sign in").click()
    await page.wait_for_url(f"{site.nodes[1].url}/")
    await page.goto(f"{site.nodes[1].url}/runs/{run}")
    bar = page.get_by_role("progressbar")
    await expect(bar).to_be_visible()
    before = int(await bar.get_attribute("aria-valuenow") or 0)
    lines = page.locator("#log-lines li")
    shown = await lines.count()

    async def has_moved() -> bool:
        return (
            int(await bar.get_attribute("aria-valuenow") or 0) > before
            and await lines.count() > shown
        )

    await until(has_moved)
    await page.get_by_role("link", name="Cancel").click()
    dialog = page.get_by_role("dialog")
    values = await bar.get_attribute("aria-valuenow")
    await until(lambda: _differs(bar, values))  # the page goes on behind the dialog, which stays
    await expect(dialog).to_be_visible()
    await dialog.get_by_role("button", name=re.compile("^Cancel")).click()
    await expect(page.locator("#p-head")).to_contain_text("Cancelled")
    assert (await site.ended(run))["state"] == "cancelled"


@pytest.mark.rest
async def test_a_log_that_is_over_opens_at_its_first_error_or_at_its_end(
    site: Site, page: Page
) -> None:
    for error, line in ((0, 300), (120, 120)):
        run = await site.start("chatty", error=error)
        await site.ended(run)
        await page.goto(f"{site.url}/runs/{run}#log")
        await expect(page.locator(f"#L{line}")).to_be_in_viewport()
        await expect(page.locator("#L1")).not_to_be_in_viewport()


async def _differs(bar: Any, value: str | None) -> bool:
    return bool(await bar.get_attribute("aria-valuenow") != value)


@pytest.mark.rest
async def test_a_stream_that_is_cut_is_said_and_comes_back(
    site: Site, page: Page, errors: Errors
) -> None:
    await open_live(page, f"{site.url}/runs")
    await expect(page.locator("#live-words")).to_contain_text("Live")
    try:
        await asyncio.to_thread(site.nodes[0].freeze, *site.databases)
        await expect(page.locator("#stale")).to_be_visible()
        await expect(page.locator("#live-words")).to_have_text("Not live")
    finally:
        site.nodes[0].process.send_signal(signal.SIGCONT)
    await expect(page.locator("#stale")).to_be_hidden()
    await expect(page.locator("#live-words")).to_contain_text("Live")
    # A service that was stopped for so long has lost its connections to PostgreSQL, and may say so
    # once.
    errors[:] = [each for each in errors if "sse:error" not in each and "status of 503" not in each]


@pytest.mark.rest
async def test_live_updates_connect_whichever_script_comes_last(site: Site, page: Page) -> None:
    async def come_late(route: Route) -> None:
        await asyncio.sleep(0.5)  # as on a slow line
        await route.continue_()

    await page.goto(f"{site.url}/runs")
    scripts = await page.evaluate("[...document.scripts].map((script) => script.src)")
    assert len(scripts) > 1
    for script in scripts:
        await page.route(script, come_late)
        await open_live(page, f"{site.url}/runs")
        await page.unroute(script, come_late)


async def hide(page: Page, is_hidden: bool) -> None:
    """Let the page believe that its tab is hidden, or that it is visible again."""
    value = "true" if is_hidden else "false"
    await page.evaluate(
        f"Object.defineProperty(document, 'hidden', {{configurable: true, get: () => {value}}})"
    )


def polls_of(page: Page, element: str) -> list[str]:
    """The addresses that the page asks for this block, from now on."""
    polls: list[str] = []

    def note(request: Request) -> None:
        if request.headers.get("hx-target") == element:
            polls.append(request.url)

    page.on("request", note)
    return polls


async def open_live(page: Page, url: str) -> None:
    """Open a page, and wait until its live updates are connected: if the clock moved before, they
    would time out.
    """
    await page.goto(url)
    await until(
        lambda: page.evaluate("Boolean(document.querySelector('#live')._htmx?.sse?.reader)")
    )


async def test_a_hidden_tab_asks_for_nothing_until_it_is_visible_again(
    site: Site, page: Page
) -> None:
    await page.clock.install()
    polls = polls_of(page, "section#all-nodes")
    await open_live(page, f"{site.url}/nodes")
    await expect(page.locator("#live-words")).to_contain_text("Live")
    await hide(page, True)
    for _ in range(3):
        await page.clock.fast_forward(60_000)
    assert polls == []
    await hide(page, False)
    await page.clock.fast_forward(2_000)
    await until(lambda: _is_longer(polls, 0))
    assert polls == [f"{site.url}/nodes"]


async def _is_longer(found: list[str], than: int) -> bool:
    return len(found) > than


async def test_a_block_that_can_not_be_refreshed_keeps_what_it_shows_and_says_so(
    site: Site, page: Page, errors: Errors
) -> None:
    async def fail_polls(route: Route) -> None:
        if route.request.headers.get("hx-target") == "div#numbers":
            await route.fulfill(status=503, body="no")
        else:
            await route.continue_()

    await page.clock.install()
    await page.route("**/tasks", fail_polls)
    await open_live(page, f"{site.url}/tasks")
    numbers = page.locator("#numbers")
    await hide(page, True)
    await page.clock.fast_forward(31_000)
    await hide(page, False)
    await page.clock.fast_forward(2_000)
    await expect(numbers).to_contain_text("Could not refresh, from")
    await expect(numbers).to_contain_text("Running now")
    await page.unroute("**/tasks", fail_polls)
    await numbers.get_by_role("button", name="Try again").click()
    await expect(numbers).not_to_contain_text("Could not refresh")
    await expect(numbers).to_contain_text("Running now")
    errors[:] = [each for each in errors if "status of 503" not in each]


@pytest.mark.rest
async def test_without_its_stream_a_page_is_read_again_every_half_minute(
    site: Site, page: Page, errors: Errors
) -> None:
    async def cut(route: Route) -> None:
        await route.abort()

    reads: list[str] = []

    def note(request: Request) -> None:
        if request.resource_type == "fetch" and request.url == f"{site.url}/runs":
            reads.append(request.url)

    await page.clock.install()
    await page.route("**/live?*", cut)
    page.on("request", note)
    await page.goto(f"{site.url}/runs")
    await page.clock.fast_forward(16_000)
    await expect(page.locator("#stale")).to_be_visible()
    assert reads == []

    half_minutes = 0

    async def is_read_after_half_a_minute() -> bool:
        nonlocal half_minutes
        half_minutes += 1
        await page.clock.fast_forward(31_000)
        return len(reads) > before

    for before in range(2):
        # The page sets its clock again when it has read the answer.
        await until(is_read_after_half_a_minute)
        assert before < len(reads) <= half_minutes
    await page.unroute("**/live?*", cut)
    await page.locator("#stale-now").click()
    await expect(page.locator("#stale")).to_be_hidden()
    await expect(page.locator("#says")).to_have_text("Live again")
    errors.clear()  # each attempt to connect has failed, and was logged


@pytest.mark.rest
async def test_rows_that_need_a_person_do_not_move_while_somebody_reads_them(
    site: Site, page: Page
) -> None:
    await fail(site, 2)
    await page.goto(site.url)
    rows = page.locator("#needs > article.pb")
    await expect(row_of(page, "orders")).to_be_visible()
    await expect(row_of(page, "parcels")).to_have_count(0)
    link = row_of(page, "orders").get_by_role("link", name="orders", exact=True)
    await link.focus()
    # One item in quarantine: the service lists it after the two runs.
    await site.ended(await site.start("parcels"))
    await expect(rows.first).to_contain_text("parcels")
    await expect(rows.first).to_have_class("pb new")
    await expect(link).to_be_focused()
    await fail(site, 1)  # the page changes again, and the order stays
    await expect(row_of(page, "orders")).to_contain_text("3 runs failed")
    await expect(rows.first).to_contain_text("parcels")
    await expect(rows.first).to_have_class("pb new")
    await expect(link).to_be_focused()
    await page.reload()
    names = await rows.get_by_role("heading").all_inner_texts()
    assert names.index("orders") < names.index("parcels")
    await expect(page.locator("article.pb.new")).to_have_count(0)


@pytest.mark.rest
async def test_keys_do_what_the_mouse_does(site: Site, page: Page) -> None:
    await page.goto(f"{site.url}/tasks")
    await page.keyboard.press("?")
    await expect(page.locator("#keys")).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator("#keys")).to_be_hidden()
    await page.keyboard.press("j")
    row = page.locator("tbody tr:focus")
    name = await row.get_attribute("id")
    await page.keyboard.press("j")
    await page.keyboard.press("k")
    assert await row.get_attribute("id") == name
    await page.keyboard.press("Enter")
    assert name is not None
    await page.wait_for_url(f"{site.url}/tasks/{name.removeprefix('t-')}")
    await page.goto(f"{site.url}/search?q=orders")
    await page.keyboard.press("g")
    await page.keyboard.press("h")
    await page.wait_for_url(f"{site.url}/")
    await page.go_back()
    await page.wait_for_url(re.compile(r"/search\?q=orders"))
    await page.go_forward()
    await expect(page.locator("#verdict")).to_be_visible()


@pytest.mark.rest
async def test_the_command_box_is_used_by_keys_alone(site: Site, page: Page) -> None:
    box, words = page.locator("#command"), page.get_by_role("combobox")
    chosen = box.locator("[aria-selected=true]")
    await page.goto(f"{site.url}/tasks/orders")
    await page.goto(f"{site.url}/tasks/tick")
    await page.keyboard.press("/")
    await expect(words).to_be_focused()
    await expect(box.get_by_role("option")).to_have_text(["orders"])
    await page.keyboard.press("Escape")
    await expect(box).to_be_hidden()
    await page.locator("header .search input").focus()
    await page.keyboard.press("Control+k")
    await expect(words).to_be_focused()
    await page.keyboard.type("pause ord")
    await expect(box.get_by_role("group", name="Do").get_by_role("option")).to_have_count(1)
    await expect(words).to_have_attribute("aria-expanded", "true")
    await expect(chosen).to_have_count(1)
    first = await words.get_attribute("aria-activedescendant")
    assert first == await chosen.get_attribute("id")
    await expect(box.get_by_role("status")).to_have_text(re.compile(r"^\d+ found$"))
    assert (await Axe().run(page)).response["violations"] == []
    await page.keyboard.press("ArrowDown")
    assert await words.get_attribute("aria-activedescendant") != first
    await page.keyboard.press("ArrowUp")
    await page.keyboard.press("ArrowUp")
    await expect(chosen).to_contain_text("Pause orders")
    await page.keyboard.press("Enter")
    asks = page.locator("dialog.ask[open]")
    await expect(asks).to_contain_text("Pause orders?")
    await expect(box).to_be_hidden()
    await page.keyboard.press("Escape")
    await expect(asks).to_be_hidden()

    # An answer that comes late is dropped: the words have changed.
    may_answer = asyncio.Event()

    async def answer_late(route: Route) -> None:
        await may_answer.wait()
        await route.continue_()

    await page.route("**/search?q=or", answer_late)
    await page.keyboard.press("Control+k")
    async with page.expect_request(re.compile(r"q=or$")):
        await page.keyboard.type("or")
    await page.keyboard.press("Control+a")
    await page.keyboard.type("tick")
    await expect(chosen).to_have_text(re.compile("^tick"))
    async with page.expect_response(re.compile(r"q=or$")):
        may_answer.set()
    await page.evaluate("fetch('/healthz')")  # an answer after it
    await expect(chosen).to_have_text(re.compile("^tick"))
    # Words that have no answer yet go to the page.
    await page.keyboard.press("Control+a")
    await page.keyboard.type("daily")
    await page.keyboard.press("Enter")
    await page.wait_for_url(re.compile(r"/search\?q=daily"))


@pytest.mark.rest
async def test_everything_works_without_a_script(site: Site, chromium: Browser) -> None:
    context = await chromium.new_context(java_script_enabled=False)
    context.set_default_timeout(PATIENCE)
    page = await context.new_page()
    await page.goto(site.url)
    await page.get_by_label("Token").fill(site.secret)
    await page.get_by_role("button", name="Sign in").click()
    await page.goto(f"{site.url}/tasks/orders")
    await page.get_by_role("link", name="Run now").click()
    await page.get_by_label("day").fill("x")
    await page.get_by_role("button", name="Start 1 run").click()
    await expect(page.get_by_role("alert")).to_contain_text("Nothing was started: 1 field")
    await expect(page.get_by_label("day")).to_have_value("x")
    await page.get_by_label("day").fill("3")
    await page.get_by_role("button", name="Start 1 run").click()
    await page.wait_for_url(re.compile(r"/runs/"))
    run = page.url.rpartition("/")[2]
    assert (await site.ended(run))["params"] == {"day": 3}
    await page.goto(f"{site.url}/tasks/tick")
    await page.get_by_role("link", name="Pause").click()
    await page.get_by_role("button", name="Pause").click()
    await page.wait_for_url(f"{site.url}/tasks/tick")
    await expect(page.locator("#contents")).to_contain_text("Paused by ann")
    await page.get_by_role("link", name="Resume").click()
    await page.get_by_role("button", name="Resume").click()
    await page.wait_for_url(f"{site.url}/tasks/tick")
    await expect(page.locator("#contents")).not_to_contain_text("Paused by ann")
    await context.close()


@EXTRA
async def test_a_backfill_is_previewed_and_made(site: Site, page: Page) -> None:
    await page.goto(f"{site.url}/tasks/daily/backfill")
    await page.get_by_role("button", name="Preview").click()
    await expect(page.locator("#preview")).to_contain_text("This will create 7 runs.")
    await page.get_by_role("button", name="Create 7 runs").click()
    await page.wait_for_url(re.compile(r"/bulks/"))
    await expect(page.locator("#bulk")).to_contain_text("Done")
    await expect(page.locator("#bulk")).to_contain_text("7 of 7 runs")


@EXTRA
async def test_an_item_in_quarantine_is_redriven(site: Site, page: Page) -> None:
    (site.folder / "good").unlink(missing_ok=True)
    run = await site.start("parcels")
    await site.ended(run)
    await page.goto(f"{site.url}/runs/{run}")
    await expect(page.locator("#quarantine")).to_contain_text("no address")
    (site.folder / "good").touch()
    await page.get_by_role("link", name="Re-drive all").click()
    await page.get_by_role("button", name=re.compile("^Re-drive")).click()
    await page.wait_for_url(lambda url: "/runs/" in url and run not in url)
    await expect(page.locator("#p-head")).to_contain_text("Succeeded")


async def incident_of(site: Site, task: str) -> str:
    """The address of the open incident of a task, once there is one."""

    async def opened() -> list[str]:
        async with site.ask() as client:
            answer = await client.get("/incidents", params={"task": task, "kind": "failed"})
        return [each["id"] for each in answer.json()["incidents"]]

    await until(opened)
    [incident] = await opened()
    return f"/incidents/{incident}"


async def addresses(site: Site) -> dict[str, str]:
    """An address of each page and of each page that asks first, by its name."""
    await fail(site, 2)
    run = await site.start("orders")
    await site.ended(run)

    incident = await incident_of(site, "orders")
    return {
        **{path: path for path in ADDRESSES},
        "run": f"/runs/{run}",
        "incident": incident,
        "retry": f"/runs/{run}/retry",
        "retry of an incident": f"{incident}/retry",
        "acknowledge": f"{incident}/acknowledge",
    }


@EXTRA
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_on_any_page(
    site: Site, page: Page, errors: Errors, scheme: Scheme
) -> None:
    found = []
    for name, address in (await addresses(site)).items():
        for width in (1280, 390):
            await show_as(page, width, scheme)
            await page.goto(site.url + address)
            violations = (await Axe().run(page)).response["violations"]
            found += [(name, width, each["id"], each["nodes"][0]["html"]) for each in violations]
    # One of the pages is not found.
    errors[:] = [each for each in errors if "status of 404" not in each]
    assert found == []


class Clicks:
    """Counts the clicks of a person."""

    def __init__(self) -> None:
        self.number = 0

    async def on(self, place: Locator) -> None:
        """Click there."""
        await place.click()
        self.number += 1


@pytest.mark.rest
async def test_few_clicks_lead_to_what_is_asked_most_at_night(site: Site, page: Page) -> None:
    """Why it failed and a retry: 2; a pause for a week with a reason: 3; all failed runs: 1; who
    changed what: 1.
    """
    room = f"{site.url}{(await addresses(site))['incident']}"
    (site.folder / "good").touch()
    await page.goto(room)  # the link of a message
    await expect(page.locator("h1")).to_contain_text("orders has been failing")
    retry = Clicks()
    await retry.on(page.get_by_role("link", name="Retry"))
    await retry.on(page.get_by_role("button", name="Retry"))
    await page.wait_for_url(re.compile(r"/runs/"))
    assert retry.number == 2
    await expect(page.locator("#p-head")).to_contain_text("Succeeded")

    await page.goto(f"{site.url}/tasks/daily")
    pause = Clicks()
    await pause.on(page.get_by_role("link", name="Pause"))
    await page.get_by_label("Why").fill("The disk is being swapped.")
    await pause.on(page.get_by_text("For a week"))
    await pause.on(page.get_by_role("button", name="Pause the task"))
    assert pause.number == 3
    await expect(page.get_by_text("Resume").first).to_be_visible()

    await page.goto(room)
    await Clicks().on(page.get_by_role("link", name="so far"))
    await expect(page.locator("#runs, table").first).to_contain_text("orders")
    await Clicks().on(page.get_by_role("link", name="Changes", exact=True))
    await expect(page.locator("main")).to_contain_text("The disk is being swapped.")
    async with site.ask() as client:
        await client.post("/tasks/daily/resume")


@pytest.mark.rest
async def test_the_list_and_the_room_of_incidents_are_used_by_keys_alone(
    site: Site, page: Page
) -> None:
    room = (await addresses(site))["incident"]
    await page.goto(site.url)
    await page.keyboard.press("g")
    await page.keyboard.press("i")
    await page.wait_for_url(f"{site.url}/incidents")
    await page.locator(f"a[href='{room}']").focus()
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{site.url}{room}")
    reached: list[str] = []
    for _ in range(60):
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate("document.activeElement.textContent.trim()"))
    for words in ("Read the end of the log", "Acknowledge…"):
        assert any(words in each for each in reached), (words, reached)


LAYOUT = (Path(__file__).parent / "layout.js").read_text()


@pytest.mark.rest
async def test_nothing_leaves_its_card_or_lies_over_anything_else_at_any_width(
    site: Site, page: Page
) -> None:
    """With names of 97 characters and errors of 3,000 in one word, in windows from a phone's to a
    large one.
    """
    name = f"wide_{'w' * 92}"
    run = await site.start(name)
    await site.ended(run)
    incident = await incident_of(site, name)
    paths = (
        "/",
        "/incidents",
        incident,
        "/tasks",
        f"/tasks/{name}",
        f"/tasks/{name}/keys",
        "/runs",
        f"/runs/{run}",
        "/backups",
        "/nodes",
        "/changes",
        "/you",
    )
    wrong: list[str] = []
    # 640 is a window of 1,280 that is shown at 200 %.
    for width in (320, 390, 640, 768, 1024, 1440):
        await show_as(page, width, "light")
        for path in paths:
            await page.goto(f"{site.url}{path}")
            wrong += [f"{path[:20]} at {width}: {what}" for what in await page.evaluate(LAYOUT)]
    assert not wrong, "\n".join(wrong)
    await page.goto(site.url)
    await expect(page.locator("article.pb", has_text="wide_")).to_be_visible()


@EXTRA
async def test_a_node_that_is_killed_is_gone_while_somebody_looks(
    site: Site, page: Page, context: BrowserContext, errors: Errors
) -> None:
    """The last test of its database: one process is missing afterwards. A page that it has shown
    says so at once.
    """
    its_page = await context.new_page()
    await open_live(its_page, f"{site.nodes[1].url}/runs")
    await expect(its_page.locator("#live-words")).to_contain_text("Live ·")
    await page.goto(f"{site.url}/nodes")
    strip = page.locator("#nodes .n:not(.db)")
    await expect(strip).to_have_count(2)
    site.nodes[1].process.kill()
    await expect(its_page.locator("#live-words")).to_have_text(
        "Not live", timeout=8 * browsers.SECOND
    )
    await its_page.close()
    errors.clear()  # a page whose server is gone logs that
    await expect(strip).to_have_count(1)
