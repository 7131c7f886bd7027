"""The sign-in page in a real browser. No browser comes from the package registry, so `make test` does not run this."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from service.config import Settings
from service.operations.context import Loaded
from service.operations.operations import open_operations
from tests.processes import UVICORN, Service, process, service
from tests.web import chromium
from tests.web.chromium import Page
from tests.web.conftest import TASKS

pytestmark = pytest.mark.nightly

MOUNTED = """
from starlette.applications import Starlette
from starlette.routing import Mount
from service.app import create_app, lifespan

app = Starlette(routes=[Mount("/ops/batch", create_app(authorize=lambda request: None))], lifespan=lifespan)
"""
ALONE, BELOW = "", "/ops/batch"
SHOTS = os.environ.get("SCREENSHOTS")
"""A folder for pictures of the page, to be looked at."""


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
    with process(folder, [word.replace("service.app:app", "mounted:app") for word in UVICORN]) as running:
        running.get = lambda path: Service.get(running, BELOW + path)  # type: ignore[method-assign]
        running.wait_until_ready()
        yield running


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with chromium.browser(tmp_path) as page:
        page.show_as(1280, "light")
        yield page


async def link() -> str:
    async with open_operations(Settings(_env_file=None), Loaded) as operations:
        return await operations.access.create_link()


def photograph(page: Page, name: str) -> None:
    """The page in light and dark colours and on a phone, where it may not be wider than the screen."""
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        page.show_as(width, scheme)
        assert page.value("document.documentElement.scrollWidth") <= width
        if SHOTS:
            Path(SHOTS).mkdir(exist_ok=True)
            page.photograph(Path(SHOTS) / f"{name}-{scheme}-{width}.png")
    page.show_as(1280, "light")


async def test_a_link_signs_in_and_makes_a_token_that_works(site: str, page: Page) -> None:
    secret = await link()
    page.open(f"{site}/signin#{secret}")
    page.until("!document.querySelector('#signed-in').hidden")
    assert page.value("location.href") == f"{site}/signin"
    assert secret not in page.value("document.documentElement.outerHTML")
    assert page.value("document.cookie") == "", "a script can read the session"
    photograph(page, "signed-in")
    page.click("#token-name")
    page.type("laptop")
    page.press("Enter", 13)
    page.until("!document.querySelector('#made').hidden")
    token = page.value("document.querySelector('#token').textContent")
    photograph(page, "made")
    assert page.value("document.querySelector('#url').textContent") == site
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}, trust_env=False) as client:
        assert (await client.get(f"{site}/api/v1/session")).json()["role"] == "operator"
        page.click("#signout")
        page.until("!document.querySelector('#signin').hidden && document.querySelector('#signed-in').hidden")
        assert page.value("fetch('api/v1/session').then(answer => answer.status)") == 401
        assert (await client.get(f"{site}/api/v1/tasks")).status_code == 200
        assert "refused to" not in " ".join(page.errors).lower(), "the policy of the page forbids a part of it"
        page.open(f"{site}/signin#{secret}")
        page.until("document.querySelector('#message').textContent.startsWith('This token or link is not valid')")
        photograph(page, "refused")
        assert token not in page.value("document.documentElement.outerHTML")


async def test_a_person_without_a_mouse_signs_in_with_a_token(site: str, page: Page) -> None:
    async with open_operations(Settings(_env_file=None), Loaded) as operations:
        made = await operations.access.create_token("ann", "viewer")
    page.open(f"{site}/signin")
    page.until("document.activeElement.id === 'secret'")
    photograph(page, "empty")
    page.type(made.secret)
    page.press("Enter", 13)
    page.until("!document.querySelector('#signed-in').hidden")
    assert "signed in as ann (viewer)" in page.value("document.querySelector('#signed-in').innerText")
    assert page.value("document.querySelector('#make').hidden"), "a viewer can make no token"
    assert made.secret not in page.value("document.documentElement.outerHTML")
    assert page.value("document.querySelector('#secret').value") == ""
    photograph(page, "viewer")
    page.open(f"{site}/signin")
    page.until("!document.querySelector('#signed-in').hidden")


def test_without_a_browser_the_test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="install Chromium"), chromium.browser(tmp_path):
        pass
