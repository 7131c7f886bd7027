"""The API in an application of somebody else, below a path such as /ops/batch."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount

from batch_system import config
from batch_system.app import create_app, lifespan
from batch_system.operations.asking.actor import Actor
from batch_system.operations.people import access
from batch_system.server.connections import Connections
from tests.web.conftest import TASKS
from tests.web.streams import Server, listening

BELOW, OWN = "/ops/batch", "/own/batch"
"""Where the service is mounted with the sign-in of the application around it, and with its own."""


async def authorize(request: Request) -> Actor | None:
    """The users of the application around it, as a header names them."""
    name = request.headers.get("x-user")
    return Actor(name, "operator", "page") if name else None


def in_starlette() -> Any:
    routes = [
        Mount(BELOW, create_app(authorize=authorize, sign_in_url="/login")),
        Mount(OWN, create_app()),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def in_fastapi() -> Any:
    app = FastAPI(lifespan=lifespan)
    app.mount(BELOW, create_app(authorize=authorize, sign_in_url="/login"))
    app.mount(OWN, create_app())
    return app


@pytest.fixture(params=[in_starlette, in_fastapi])
async def app(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Any]:
    (tmp_path / "tasks/some.py").write_text(TASKS)
    monkeypatch.setenv("LEDGER_URL", "sqlite:///ledger.db")
    config.forget_settings()
    app = request.param()
    async with app.router.lifespan_context(app):
        yield app


@pytest.fixture
async def client(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://ops.example") as client:
        yield client


async def test_the_page_and_its_files_are_below_the_path(client: httpx.AsyncClient) -> None:
    page = await client.get(f"{OWN}/signin")
    assert page.status_code == 200 and "<form" in page.text
    files = re.findall(r'(?:href|src)="([^"]+\.(?:js|css|svg))"', page.text)
    assert len(files) >= 3
    for path in files:
        assert path.startswith(f"{OWN}/static/")
        assert (await client.get(path)).status_code == 200
        assert (await client.get(path.removeprefix(OWN))).status_code == 404


async def test_the_pages_are_those_of_a_user_of_the_application_around_it(
    client: httpx.AsyncClient,
) -> None:
    night = await client.get(f"{BELOW}/", headers={"X-User": "ann"})
    assert night.status_code == 200 and "Nothing needs you." in night.text
    links = re.findall(r'(?:href|src|action)="(/[^"]*)"', night.text)
    assert links and all(link.startswith(f"{BELOW}/") for link in links)
    for path, sign_in in ((BELOW, "/login"), (OWN, f"{OWN}/signin?next=%2F")):
        refused = await client.get(f"{path}/")
        assert (refused.status_code, refused.headers["location"]) == (303, sign_in)


async def test_the_document_leads_to_the_resources(client: httpx.AsyncClient) -> None:
    document = (await client.get(f"{BELOW}/api/openapi.json")).json()
    (server,) = document["servers"]
    assert server == {"url": BELOW}
    url = server["url"] + "/api/v1/tasks"
    assert "/api/v1/tasks" in document["paths"]
    assert (await client.get(url, headers={"X-User": "ann"})).status_code == 200
    assert (await client.get(url)).status_code == 401
    refused = await client.put(url, headers={"X-User": "ann"})
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")


async def test_tokens_and_users_of_the_application_around_it_are_known(
    app: Any, client: httpx.AsyncClient
) -> None:
    token = await access.create_token(app.state.batch.operations.context, "ci", "viewer")
    bearer = {"Authorization": f"Bearer {token.secret}"}
    assert (await client.get(f"{BELOW}/api/v1/session", headers=bearer)).json()["name"] == "ci"
    ann = {"X-User": "ann"}
    assert (await client.get(f"{BELOW}/api/v1/session", headers=ann)).json()["role"] == "operator"
    assert (await client.post(f"{BELOW}/api/v1/tasks/report/pause", headers=ann)).status_code == 200
    foreign = {**ann, "Origin": "http://evil.example"}
    assert (
        await client.post(f"{BELOW}/api/v1/tasks/report/resume", headers=foreign)
    ).status_code == 403
    changes = (
        await client.get(f"{BELOW}/api/v1/changes", params={"task": "report"}, headers=bearer)
    ).json()
    assert [(change["actor"], change["source"]) for change in changes["changes"]] == [
        ("ann", "page")
    ]


async def test_the_cookie_is_sent_below_the_path_and_taken_away_again(
    app: Any, client: httpx.AsyncClient
) -> None:
    token = await access.create_token(app.state.batch.operations.context, "ann", "admin")
    begun = await client.post(f"{OWN}/api/v1/session", json={"secret": token.secret})
    assert begun.status_code == 201 and "Path=/own/batch;" in begun.headers["set-cookie"]
    session = (await client.get(f"{OWN}/api/v1/session")).json()
    assert session["name"] == "ann"
    changed = {"X-CSRF-Token": session["csrf_token"], "Origin": "http://ops.example"}
    made = await client.post(
        f"{OWN}/api/v1/tokens", json={"name": "x", "role": "viewer"}, headers=changed
    )
    assert made.status_code == 201
    assert (await client.delete(f"{OWN}/api/v1/session", headers=changed)).status_code == 204
    assert [cookie.name for cookie in client.cookies.jar] == []
    assert (await client.get(f"{OWN}/api/v1/session")).status_code == 401


async def test_over_https_the_cookie_has_a_name_that_binds_it_to_the_host(app: Any) -> None:
    token = await access.create_token(app.state.batch.operations.context, "ann", "admin")
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="https://ops.example"
    ) as client:
        begun = await client.post(f"{OWN}/api/v1/session", json={"secret": token.secret})
        cookie = begun.headers["set-cookie"]
        assert cookie.startswith("__Host-") and "Path=/;" in cookie and "Secure" in cookie
        csrf = (await client.get(f"{OWN}/api/v1/session")).json()["csrf_token"]
        assert (
            await client.delete(f"{OWN}/api/v1/session", headers={"X-CSRF-Token": csrf})
        ).status_code == 204
        assert [cookie.name for cookie in client.cookies.jar] == []


async def test_probes_and_live_events_are_below_the_path(
    app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_system.web.live.LOOK_SECONDS", 0.05)
    site = Server(app, Connections(limit=10))
    await site.open()
    async with site.client() as client:
        assert (await client.get(f"{BELOW}/readyz")).status_code == 200
        assert (await client.get(f"{BELOW}/scheduler/jobs")).status_code == 200
        async with listening(client, "tasks", below=BELOW, **{"X-User": "ann"}) as stream:
            await client.post(f"{BELOW}/api/v1/tasks/report/pause", headers={"X-User": "ann"})
            await stream.until("task", paused=True)
            app.state.batch.stopping.set()
            assert await stream.rest() == []
    await site.close()


async def test_an_action_leads_back_to_a_page_below_the_path(client: httpx.AsyncClient) -> None:
    ann, site = {"x-user": "ann"}, "http://ops.example"
    for referer, came_from in (
        (f"{site}{BELOW}/tasks?show=running", "/tasks?show=running"),
        (f"{site}/tasks", ""),
    ):
        asked = await client.get(f"{BELOW}/tasks/report/pause", headers={**ann, "Referer": referer})
        assert f'name="next" value="{came_from}"' in asked.text
        assert f'<a class="btn" href="{BELOW}{came_from or "/tasks/report"}"' in asked.text
    sent = {**ann, "Origin": site}
    wrong = {"note": "x" * 3_000, "next": "/tasks?show=running"}
    again = await client.post(f"{BELOW}/tasks/report/pause", headers=sent, data=wrong)
    assert again.status_code == 422 and f'action="{BELOW}/tasks/report/pause"' in again.text
    done = await client.post(
        f"{BELOW}/tasks/report/pause", headers=sent, data={"next": "/tasks?show=running"}
    )
    assert done.headers["location"] == f"{BELOW}/tasks?show=running"
