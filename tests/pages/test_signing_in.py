"""Signing in with a real browser: by a link, by a token, alone and below a path of another
application.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.async_api import BrowserContext, Page, expect

from batch_system.config import Settings
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import open_operations
from batch_system.operations.people import access
from tests.processes import UVICORN, Service, process, service
from tests.web import browsers
from tests.web.browsers import PATIENCE, Errors, show_as
from tests.web.conftest import TASKS

pytestmark = pytest.mark.nightly
expect.set_options(timeout=PATIENCE)

MOUNTED = """
from starlette.applications import Starlette
from starlette.routing import Mount
from batch_system.app import create_app, lifespan

app = Starlette(routes=[Mount("/ops/batch", create_app())], lifespan=lifespan)
"""
ALONE, BELOW = "", "/ops/batch"


@pytest.fixture(params=[ALONE, BELOW], ids=["alone", "mounted"])
async def site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """The URL of the service, by itself or in another application."""
    (tmp_path / "tasks/some.py").write_text(TASKS)
    (tmp_path / "mounted.py").write_text(MOUNTED)
    with service(tmp_path) if request.param == ALONE else service_below(tmp_path) as running:
        yield running.url + request.param


@contextmanager
def service_below(folder: Path) -> Iterator[Service]:
    """A service in another application, which has no /readyz of its own."""
    with process(
        folder, [word.replace("batch_system.app:app", "mounted:app") for word in UVICORN]
    ) as running:
        running.get = lambda path: Service.get(running, BELOW + path)  # type: ignore[method-assign]
        running.wait_until_ready()
        yield running


@pytest.fixture
async def context() -> AsyncIterator[BrowserContext]:
    async with browsers.browser() as chromium:
        context = await chromium.new_context()
        context.set_default_timeout(PATIENCE)
        yield context


async def no_page_is_wider_than_the_screen(page: Page) -> None:
    for width in (1280, 390):
        await show_as(page, width, "light")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width


async def test_a_link_signs_in_and_makes_a_token_that_works(
    site: str, context: BrowserContext
) -> None:
    errors = Errors()
    errors.watch(context)
    async with open_operations(Settings(_env_file=None), Loaded) as operations:
        secret = await access.create_link(operations.context)
    page = await context.new_page()
    await page.goto(f"{site}/signin#{secret}")
    await page.wait_for_url(f"{site}/")
    assert secret not in await page.content()
    assert await page.evaluate("document.cookie") == "", "a script can read the session"
    await page.goto(f"{site}/you")
    await no_page_is_wider_than_the_screen(page)
    await page.get_by_label("Name").fill("laptop")
    await page.get_by_role("button", name="Make the token").click()
    shown = page.get_by_role("status").filter(has_text="The token laptop")
    token = (await shown.locator("pre").first.inner_text()).strip()
    await expect(shown).to_contain_text(f"batch --url {site} --token-file FILE runs")
    async with httpx.AsyncClient(
        headers={"Authorization": f"Bearer {token}"}, trust_env=False
    ) as client:
        assert (await client.get(f"{site}/api/v1/session")).json()["role"] == "operator"
        await page.get_by_role("button", name="Sign out").click()
        await page.wait_for_url(f"{site}/signin")
        await page.goto(f"{site}/runs")
        assert page.url.startswith(f"{site}/signin?next=")
        assert (await client.get(f"{site}/api/v1/tasks")).status_code == 200
    assert errors == []
    await page.goto(f"{site}/signin#{secret}")
    await expect(page.get_by_role("alert")).to_contain_text("This token or link is not valid")
    assert token not in await page.content()


async def test_a_person_without_a_mouse_signs_in_with_a_token(
    site: str, context: BrowserContext
) -> None:
    async with open_operations(Settings(_env_file=None), Loaded) as operations:
        made = await access.create_token(operations.context, "bea", "viewer")
    page = await context.new_page()
    await page.goto(f"{site}/signin")
    await expect(page.get_by_label("Token")).to_be_focused()
    await no_page_is_wider_than_the_screen(page)
    await page.keyboard.type(made.secret)
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{site}/")
    await page.goto(f"{site}/you")
    await expect(page.locator("#contents")).to_contain_text("Your role is viewer")
    await expect(page.get_by_role("button", name="Make the token")).to_have_count(0)
    assert made.secret not in await page.content()


async def test_without_a_browser_the_test_says_what_gets_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CHROMIUM", str(tmp_path / "nothing"))
    with pytest.raises(AssertionError, match="make tools"):
        async with browsers.browser():
            pass
