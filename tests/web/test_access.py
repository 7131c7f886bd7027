"""Who may ask what: every resource, for every role, with every kind of credentials that is not
good.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from batch_system import clock
from batch_system.app import create_app
from batch_system.batch.ledger.people import access
from batch_system.config import forget_settings, get_settings
from batch_system.errors import InvalidSetting
from batch_system.operations.asking.actor import Actor, Role
from batch_system.operations.asking.context import Context
from batch_system.operations.people import access as people_access
from batch_system.operations.people.access import create_link, create_token, hash_of, sign_in
from batch_system.server.uvicorn import listen
from batch_system.verbs.access import RevokeToken
from batch_system.verbs.verb import all_verbs
from batch_system.web.csrf import csrf_of
from batch_system.web.limits import LOOKS
from tests.batch.ledger_world import until
from tests.web.conftest import Served, client_of

RUN = "01a21d92-eff2-7bb2-a544-63212a7a4a49"

NEEDED: dict[tuple[str, str], Role] = {
    **{
        (verb.doors.http.method, verb.doors.http.path): verb.doors.role
        for verb in all_verbs()
        if verb.doors.http is not None
    },
    ("GET", "/events"): "viewer",
    ("GET", "/session"): "viewer",
    ("DELETE", "/session"): "viewer",
}
"""The role that each resource needs. `POST /session` needs none, because it is how a person signs
in.
"""

INTERVAL = {"since": "2026-11-01T00:00:00Z", "until": "2026-11-02T00:00:00Z"}
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/tasks/{name}/runs"): {},
    ("POST", "/tasks/{name}/backfill"): {"preview": RUN},
    ("POST", "/tasks/{name}/backfill/preview"): INTERVAL,
    ("POST", "/runs/bulk"): {"action": "retry", "filter": {}},
    ("POST", "/tokens"): {"name": "another", "role": "viewer"},
    ("POST", "/incidents/{incident}/acknowledge"): {"note": "seen"},
    ("POST", "/slots/leave"): {**INTERVAL, "note": "seen"},
    ("POST", "/slots/reopen"): INTERVAL,
    ("POST", "/tasks/{name}/mute"): {"until": "2026-01-01T00:00:00Z"},
}
QUERIES = {"/account": {"since": "2026-11-26T00:00:00Z"}, "/events": {"topic": "wrong"}}


async def ask(
    client: httpx.AsyncClient, endpoint: tuple[str, str], **options: Any
) -> httpx.Response:
    method, path = endpoint
    names = {"name": "unknown", "given": RUN, "run": RUN, "preview": RUN, "incident": RUN}
    names |= {"window": RUN, "session": RUN.replace("-", "")}
    body = {"json": BODIES[endpoint]} if endpoint in BODIES else {}
    url = "/api/v1" + path.format(**names)
    return await client.request(method, url, params=QUERIES.get(path), **body, **options)


async def test_the_table_has_every_resource_of_the_document(served: Served) -> None:
    document = (await served.nobody.get("/api/openapi.json")).json()
    operations = {
        (m.upper(), path.removeprefix("/api/v1"))
        for path, ms in document["paths"].items()
        for m in ms
    }
    assert operations == NEEDED.keys() | {("POST", "/session")}
    assert document["openapi"].startswith("3.1")


@pytest.mark.rest
async def test_each_resource_refuses_credentials_that_are_not_good(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await create_token(served.operations.context, "old", "admin", timedelta(days=1))
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(
            access.tokens.update()
            .where(access.tokens.c.id == made.id)
            .values(expires_at=clock.now() - timedelta(days=1))
        )
    revoked = await create_token(served.operations.context, "revoked", "admin")
    await served.operations(RevokeToken(name="revoked"))
    session = await sign_in(served.operations.context, served.secrets["admin"], None)
    assert session is not None
    cookie = {"Cookie": f"batch_session={session.secret}"}
    good = {"Authorization": f"Bearer {served.secrets['admin']}"}
    with_csrf = {**cookie, "X-CSRF-Token": csrf_of(session.secret)}
    wrong: dict[str, tuple[dict[str, str], set[int]]] = {
        "none": ({}, {401}),
        "unknown": ({"Authorization": f"Bearer bt_{'0' * 12}_{'x' * 43}"}, {401}),
        "malformed": ({"Authorization": "Bearer \x7f"}, {401}),
        "another scheme": ({"Authorization": "Basic YTpi"}, {401}),
        "expired": ({"Authorization": f"Bearer {made.secret}"}, {401}),
        "revoked": ({"Authorization": f"Bearer {revoked.secret}"}, {401}),
        "of another host": ({**good, "Host": "evil.example"}, {421}),
        "a cookie without a CSRF token": (cookie, {403}),
        "a cookie with another CSRF token": ({**cookie, "X-CSRF-Token": "0" * 64}, {403}),
        "a cookie from another origin": ({**with_csrf, "Origin": "http://evil.example"}, {403}),
        "a cookie from another site": ({**with_csrf, "Sec-Fetch-Site": "cross-site"}, {403}),
        "a cookie of nobody": ({"Cookie": f"batch_session=bs_{'0' * 12}_{'x' * 43}"}, {401}),
    }
    monkeypatch.setattr("batch_system.web.limits._Windows.full", lambda self, key: None)
    for endpoint in NEEDED:
        for name, (headers, statuses) in wrong.items():
            if (
                endpoint[0] == "GET"
                and name.startswith("a cookie")
                and name != "a cookie of nobody"
            ):
                continue  # a read changes nothing, and a page of another site can't see the answer
            answer = await ask(served.nobody, endpoint, headers=headers)
            assert answer.status_code in statuses, (endpoint, name, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
    answer = await served.nobody.get(
        "/api/v1/tasks", headers={**cookie, "Sec-Fetch-Site": "cross-site"}
    )
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


async def test_a_secret_stands_in_no_table_of_the_ledger(served: Served) -> None:
    session = await sign_in(served.operations.context, served.secrets["admin"], None)
    assert session is not None
    async with served.service.ledger.engine.connect() as connection:
        for table in (access.tokens, access.sessions):
            stored = str((await connection.execute(table.select())).all())
            assert served.secrets["admin"] not in stored and session.secret not in stored
            assert hash_of(session.secret) in stored or table is access.tokens
    assert served.secrets["admin"] not in repr(session) and session.secret not in repr(session)


@pytest.mark.rest
async def test_a_session_is_known_by_its_cookie_and_ends_with_a_sign_out(served: Served) -> None:
    client = served.nobody
    begun = await client.post("/api/v1/session", json={"secret": served.secrets["operator"]})
    assert begun.status_code == 201
    cookie = begun.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    shown = (await client.get("/api/v1/session")).json()
    assert (shown["name"], shown["role"]) == ("operator", "operator")
    changed = {"X-CSRF-Token": shown["csrf_token"]}
    assert (await client.post("/api/v1/tasks/report/pause")).status_code == 403
    assert (await client.post("/api/v1/tasks/report/pause", headers=changed)).status_code == 200
    assert (await client.delete("/api/v1/session", headers=changed)).status_code == 204
    assert (await client.get("/api/v1/session")).status_code == 401
    events = (await served.admin.get("/api/v1/changes?action=task.pause")).json()["changes"]
    assert [(event["actor"], event["source"], event["address"]) for event in events] == [
        ("operator", "page", "127.0.0.1")
    ]


async def test_a_link_signs_in_once_and_not_when_it_is_old(served: Served) -> None:
    link = await create_link(served.operations.context)
    client = served.nobody
    assert (await client.post("/api/v1/session", json={"secret": link})).status_code == 201
    client.cookies.clear()
    again = await client.post("/api/v1/session", json={"secret": link})
    assert again.status_code == 401
    assert link not in again.text
    old = await create_link(served.operations.context)
    async with served.service.ledger.engine.begin() as connection:
        expired = access.tokens.update().where(access.tokens.c.hash == hash_of(old))
        await connection.execute(expired.values(expires_at=clock.now() - timedelta(seconds=1)))
    assert (await client.post("/api/v1/session", json={"secret": old})).status_code == 401


async def test_a_revoked_token_ends_its_sessions_too(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await create_token(served.operations.context, "laptop", "viewer")
    session = await sign_in(served.operations.context, made.secret, None)
    assert session is not None
    headers = {"Cookie": f"batch_session={session.secret}"}
    assert (await served.nobody.get("/api/v1/tasks", headers=headers)).status_code == 200
    assert (await served.admin.delete("/api/v1/tokens/laptop")).status_code == 200
    monkeypatch.setattr("batch_system.web.access.KNOWN_SECONDS", 0.0)
    now = clock.monotonic()
    monkeypatch.setattr(clock, "monotonic", lambda: now + 1.1)
    assert (await served.nobody.get("/api/v1/tasks", headers=headers)).status_code == 401


async def test_too_many_wrong_tokens_of_an_address_are_refused_for_a_while(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.monotonic()
    monkeypatch.setattr(clock, "monotonic", lambda: now)
    guesser, other = (
        client_of(served.service_app, host=host) for host in ("127.0.0.2", "127.0.0.3")
    )
    looked: list[str] = []
    holder = people_access.holder

    async def count(context: Context, secret: str, address: str | None) -> Actor | None:
        looked.append(secret)
        return await holder(context, secret, address)

    monkeypatch.setattr(people_access, "holder", count)
    headers = {"Authorization": f"Bearer bt_{'0' * 12}_{'x' * 43}"}
    for _ in range(20):
        assert (await guesser.get("/api/v1/tasks", headers=headers)).status_code == 401
    refused = await guesser.get("/api/v1/tasks", headers=headers)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "60"
    wrong = {"secret": f"bt_{'0' * 12}_{'y' * 43}"}
    assert (await guesser.post("/api/v1/session", json=wrong)).status_code == 429
    assert (await guesser.post("/signin", data=wrong)).status_code == 429
    valid = {"Authorization": f"Bearer {served.secrets['viewer']}"}
    assert (await guesser.get("/api/v1/tasks", headers=valid)).status_code == 200
    assert (
        await guesser.post("/api/v1/session", json={"secret": served.secrets["viewer"]})
    ).status_code == 201
    assert (await guesser.get("/api/v1/tasks")).status_code == 200, (
        "its session is not refused either"
    )
    looked.clear()
    for number in range(30):
        guess = {"Authorization": f"Bearer bt_{number:012}_{'x' * 43}"}
        assert (await guesser.get("/api/v1/tasks", headers=guess)).status_code == 429
    assert 0 < len(looked) <= LOOKS
    # What was valid just now may be asked about again, whoever else guesses at this address
    now += 1.1
    for headers_of in (valid, {}):
        assert (await guesser.get("/api/v1/tasks", headers=headers_of)).status_code == 200
    assert (await other.get("/api/v1/tasks", headers=headers)).status_code == 401
    now += 61
    assert (await guesser.get("/api/v1/tasks", headers=headers)).status_code == 401


async def test_one_token_may_make_so_many_requests_in_a_second(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = clock.monotonic()
    monkeypatch.setattr(clock, "monotonic", lambda: now)
    statuses = [(await served.viewer.get("/api/v1/session")).status_code for _ in range(101)]
    assert statuses == [200] * 100 + [429]
    assert (await served.operator.get("/api/v1/session")).status_code == 200
    now += 1.1
    assert (await served.viewer.get("/api/v1/session")).status_code == 200


async def test_an_application_around_it_says_who_asks(served: Served) -> None:
    async def authorize(request: Any) -> Actor | None:
        name = request.headers.get("x-user")
        return Actor(name, "operator", "page") if name else None

    app = create_app(authorize=authorize)
    app.state.batch = served.service
    client = client_of(app)
    assert (await client.get("/api/v1/tasks")).status_code == 401
    assert (
        await client.post("/api/v1/tasks/report/pause", headers={"X-User": "ann"})
    ).status_code == 200
    begun = await served.nobody.post("/api/v1/session", json={"secret": served.secrets["admin"]})
    client.cookies = begun.cookies
    assert (await client.get("/api/v1/tasks")).status_code == 401, (
        "a session of the service is not looked at"
    )
    secret = {"secret": served.secrets["admin"]}
    assert (await client.post("/api/v1/session", json=secret)).status_code == 403
    assert (await client.post("/signin", data=secret)).status_code == 403
    for path in ("/", "/signin"):
        page = await client.get(path)
        assert (page.status_code, "<form" in page.text) == (401, False)
    by_token = {"Authorization": f"Bearer {served.secrets['viewer']}"}
    assert (await client.get("/api/v1/tasks", headers=by_token)).status_code == 200
    basic = {"X-User": "ann", "Authorization": "Basic YTpi"}
    assert (await client.get("/api/v1/tasks", headers=basic)).status_code == 401
    elsewhere = create_app(authorize=authorize, sign_in_url="https://ops.example/login")
    elsewhere.state.batch = served.service
    for path in ("/", "/signin"):
        page = await client_of(elsewhere).get(path)
        assert (page.status_code, page.headers["location"]) == (303, "https://ops.example/login")
    foreign = {"X-User": "ann", "Origin": "http://evil.example"}
    assert (await client.post("/api/v1/tasks/report/resume", headers=foreign)).status_code == 403
    changes = (await served.viewer.get("/api/v1/changes?action=task.pause")).json()["changes"]
    assert changes[0]["actor"] == "ann"


async def test_jobs_need_a_token_from_elsewhere(served: Served) -> None:
    here, elsewhere = client_of(served.service_app), client_of(served.service_app, host="10.1.2.3")
    assert (await here.get("/scheduler/jobs")).status_code == 200
    assert (await elsewhere.get("/scheduler/jobs")).status_code == 401
    headers = {"Authorization": f"Bearer {served.secrets['viewer']}"}
    assert (await elsewhere.get("/scheduler/jobs", headers=headers)).status_code == 200


async def test_every_answer_has_the_headers_of_security(served: Served) -> None:
    for path in ("/healthz", "/signin", "/", "/api/v1/tasks", "/nothing", "/scheduler/jobs"):
        headers = (await served.nobody.get(path)).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"


async def test_probes_are_answered_for_any_host(served: Served) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await served.nobody.get(path, headers={"Host": "10.0.0.7:8000"})).status_code == 200
    assert (
        await served.nobody.get("/scheduler/jobs", headers={"Host": "10.0.0.7:8000"})
    ).status_code == 421


async def test_a_large_body_is_refused_before_it_is_read(served: Served) -> None:
    async def endless() -> Any:
        while True:
            yield b" " * 100_000

    declared = await served.operator.post(
        "/api/v1/runs/bulk", content=b"{}", headers={"Content-Length": str(10**9)}
    )
    assert declared.status_code == 413
    streamed = await served.operator.post(
        "/api/v1/runs/bulk", content=endless(), headers={"Content-Type": "application/json"}
    )
    assert streamed.status_code == 413


@pytest.mark.parametrize("path", ["/api/v1/tasks/report/runs", "/tasks/report/start"])
async def test_nobody_is_refused_before_the_body_is_read(served: Served, path: str) -> None:
    read = 0

    async def body() -> Any:
        nonlocal read
        read += 1
        yield b"{}"

    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await served.nobody.post(path, content=body(), headers=headers)).status_code == 401
    assert read == 0


async def test_a_sign_in_ends_the_session_before_it(served: Served) -> None:
    first = await served.nobody.post("/api/v1/session", json={"secret": served.secrets["viewer"]})
    cookie = first.headers["set-cookie"].split(";")[0]
    assert (
        await served.nobody.get("/api/v1/tasks")
    ).status_code == 200  # so the answer is remembered for a second
    as_token = {"Authorization": f"Bearer {cookie.partition('=')[2]}"}
    assert (await served.nobody.get("/api/v1/tasks", headers=as_token)).status_code == 401
    await served.nobody.post("/api/v1/session", json={"secret": served.secrets["operator"]})
    served.nobody.cookies.clear()
    assert (await served.nobody.get("/api/v1/tasks", headers={"Cookie": cookie})).status_code == 401


async def test_wrong_tokens_are_in_the_audit_once_a_minute_with_their_addresses(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batch_system.web.access.NOTE_SECONDS", 0.0)
    guesser = client_of(served.service_app, f"bt_{'0' * 12}_{'x' * 43}", host="10.9.8.7")
    for _ in range(3):
        await guesser.get("/api/v1/tasks")

    async def noted() -> list[Any]:
        changes = (await served.viewer.get("/api/v1/changes?action=session.refuse")).json()[
            "changes"
        ]
        return [change["after"] for change in changes]

    async def is_noted() -> bool:
        return await noted() != []

    await until(is_noted)
    assert await noted() in ([{"10.9.8.7": 1}], [{"10.9.8.7": 2}], [{"10.9.8.7": 3}])
    await guesser.get("/api/v1/tasks")
    assert len(await noted()) == 1


def with_settings(served: Served, **settings: Any) -> Starlette:
    """An application of the same service with other settings."""
    served.service.settings = served.service.settings.model_copy(update=settings)
    app = create_app()
    app.state.batch = served.service
    return app


async def test_a_person_is_believed_only_where_a_trusted_proxy_names_him(served: Served) -> None:
    app = with_settings(
        served,
        BATCH_AUTH_HEADER="X-Forwarded-Email",
        BATCH_TRUSTED_PROXIES="10.0.0.0/24",
        BATCH_AUTH_ROLES="*@acme.example=viewer,ops@acme.example=operator",
    )
    proxy, other = client_of(app, host="10.0.0.7"), client_of(app, host="10.0.1.7")
    viewer, operator = ({"X-Forwarded-Email": f"{name}@acme.example"} for name in ("ann", "ops"))
    assert (await proxy.get("/api/v1/session", headers=viewer)).json()["role"] == "viewer"
    assert (await proxy.get("/api/v1/session", headers=operator)).json()["role"] == "operator"
    assert (await other.get("/api/v1/session", headers=operator)).status_code == 401
    stranger = {"X-Forwarded-Email": "eve@evil.example"}
    assert (await proxy.get("/api/v1/session", headers=stranger)).status_code == 403
    both = [("X-Forwarded-Email", "ops@acme.example"), ("X-Forwarded-Email", "ann@acme.example")]
    assert (await proxy.get("/api/v1/session", headers=both)).status_code == 400
    foreign = {**operator, "Origin": "http://evil.example"}
    assert (await proxy.post("/api/v1/tasks/report/pause", headers=foreign)).status_code == 403


async def test_a_proxy_names_groups_and_may_send_credentials_of_its_own_along(
    served: Served,
) -> None:
    app = with_settings(
        served,
        BATCH_AUTH_HEADER="X-Forwarded-Email",
        BATCH_AUTH_GROUPS_HEADER="X-Forwarded-Groups",
        BATCH_TRUSTED_PROXIES="10.0.0.0/24",
        BATCH_AUTH_ROLES="*@acme.example=viewer,group:oncall=operator,group:*-admins=admin",
    )
    proxy, other = client_of(app, host="10.0.0.7"), client_of(app, host="10.0.1.7")

    async def role(groups: str, client: Any = proxy, **more: str) -> Any:
        headers = {"X-Forwarded-Email": "ann@acme.example", "X-Forwarded-Groups": groups, **more}
        answer = await client.get("/api/v1/session", headers=headers)
        return answer.json().get("role", answer.status_code)

    assert await role("dev, oncall") == "operator"
    assert await role("batch-admins,dev") == "admin"
    assert await role("on-call, group:oncall") == await role("") == "viewer"
    assert await role("oncall", other) == 401
    named = {"X-Forwarded-Email": "group:oncall", "X-Forwarded-Groups": "dev"}
    assert (await proxy.get("/api/v1/session", headers=named)).status_code == 403
    # A proxy may pass its OpenID token on; from elsewhere, that is a wrong token.
    assert await role("oncall", Authorization="Bearer eyJhbGciOi.eyJzdWIi.c2ln") == "operator"
    assert await role("oncall", other, Authorization="Bearer eyJhbGciOi.eyJzdWIi.c2ln") == 401
    twice = [("X-Forwarded-Email", "ann@acme.example")] + [("X-Forwarded-Groups", "dev")] * 2
    assert (await proxy.get("/api/v1/session", headers=twice)).status_code == 400


async def test_without_sign_in_only_this_machine_is_answered(served: Served) -> None:
    app = with_settings(served, BATCH_AUTH="off")
    here, elsewhere = client_of(app), client_of(app, host="10.1.2.3")
    assert (await here.get("/api/v1/session")).json()["role"] == "admin"
    assert (await elsewhere.get("/api/v1/session")).status_code == 401
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert (await here.post("/api/v1/tasks/report/pause", headers=foreign)).status_code == 403
    assert (
        await here.get("/api/v1/tasks", headers={**foreign, "Sec-Fetch-Mode": "cors"})
    ).status_code == 403
    assert (
        await here.get("/tasks", headers={**foreign, "Sec-Fetch-Mode": "navigate"})
    ).status_code == 200
    assert (await here.get("/metrics", headers={"Host": "evil.example"})).status_code == 401
    assert (await here.get("/metrics", headers={"Host": "[::1].evil.example"})).status_code == 401
    for header in ("X-Forwarded-For", "X-Forwarded-Proto", "Forwarded", "Via"):
        for path in ("/api/v1/session", "/metrics", "/scheduler/jobs"):
            assert (await here.get(path, headers={header: "127.0.0.1"})).status_code == 401


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("BATCH_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("BATCH_AUTH_ROLES", "ann=king"),
        ("BATCH_AUTH_ROLES", "ann"),
    ],
)
async def test_a_setting_that_can_t_be_read_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    monkeypatch.setenv(setting, value)
    forget_settings()
    app = create_app()
    with pytest.raises(InvalidSetting, match=f"setting {setting}"):
        async with app.router.lifespan_context(app):
            pass


async def test_sign_in_can_t_be_off_where_others_reach_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATCH_AUTH", "off")
    forget_settings()
    with pytest.raises(
        InvalidSetting, match=r"BATCH_AUTH: off is only allowed if HOST is a loopback address"
    ):
        listen(get_settings(), "0.0.0.0", 0)
    listen(get_settings(), "127.0.0.1", 0).close()


async def test_the_address_and_the_scheme_of_a_client_are_believed_of_a_trusted_proxy_only(
    served: Served,
) -> None:
    app = with_settings(served, BATCH_TRUSTED_PROXIES="10.0.0.0/24")
    told = {"X-Forwarded-For": "1.1.1.1, 203.0.113.9, 10.0.0.8", "X-Forwarded-Proto": "https"}
    secret = {"secret": served.secrets["viewer"]}
    for host, address, is_secure in (
        ("10.0.0.7", "203.0.113.9", True),
        ("10.9.9.9", "10.9.9.9", False),
    ):
        client = client_of(app, host=host)
        answer = await client.post("/api/v1/session", json=secret, headers=told)
        assert ("Secure" in answer.headers["set-cookie"]) == is_secure
        [event, *_] = (await served.admin.get("/api/v1/changes?action=session.begin")).json()[
            "changes"
        ]
        assert event["address"] == address
    for hop, address in (
        ("8.8.8.8:4433", "8.8.8.8"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "2001:db8::1"),
        ("1.2.3.4, unknown", "unknown"),
        ("1.2.3.4, _hidden, 10.0.0.8", "unknown"),
    ):
        await client_of(app, host="10.0.0.7").post(
            "/api/v1/session", json=secret, headers={"X-Forwarded-For": hop}
        )
        [event, *_] = (await served.admin.get("/api/v1/changes?action=session.begin")).json()[
            "changes"
        ]
        assert event["address"] == address
    for wrong in ("", "nonsense", "203.0.113.9, nonsense", "," * 1_000):
        answer = await client_of(app, host="10.0.0.7").get(
            "/api/v1/tasks", headers={"X-Forwarded-For": wrong}
        )
        assert answer.status_code == 401


async def test_nothing_asks_the_ledger_after_the_service_has_stopped(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was opened then would never be closed."""
    monkeypatch.setenv(
        "LEDGER_URL",
        database_url if database_url.startswith("postgresql") else "sqlite:///ledger.db",
    )
    forget_settings()
    app = create_app()
    async with app.router.lifespan_context(app):
        made = await create_token(app.state.batch.operations.context, "ann", "viewer")
        assert (await client_of(app, made.secret).get("/api/v1/session")).status_code == 200
        # The use of the token is written a second later.
        noting = app.guard._noting  # type: ignore[attr-defined]
    assert noting.cancelled()
