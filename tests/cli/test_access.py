"""`batch token …` and `batch changes`: who may use the API, and who has changed what."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from batch_system import clock
from batch_system.database.engine import Database
from batch_system.operations.people import access
from batch_system.operations.people.results import Change, NewToken, Token
from tests.asking import operations_on
from tests.batch.ledger_world import know, make_task
from tests.batch.test_runs import insert, new
from tests.commands import Batch, in_this_process, refuses


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    monkeypatch.setenv("LOGNAME", "ann")
    yield from in_this_process(capsys, monkeypatch)


@pytest.fixture
def call(batch: Batch, ledger: Database, ledger_url: str) -> Any:
    async def call(*words: str) -> Any:
        return await asyncio.to_thread(batch, *words, LEDGER_URL=ledger_url)

    return call


async def test_the_secret_of_a_token_stands_alone_on_stdout_and_is_valid(
    ledger: Database, call: Any
) -> None:
    done = await call("token", "create", "deploy", "--role", "operator", "--expires", "90d")
    assert done.code == 0 and re.fullmatch(r"bt_\w{12}_[\w-]{43}\n", done.out)
    assert "the token deploy has the role operator, and is valid until " in done.err
    holder = await access.holder(operations_on(ledger).context, done.out.strip(), None)
    assert holder is not None and (holder.name, holder.role) == ("deploy", "operator")
    listed = await call("token", "list")
    assert "deploy" in listed.out and done.out.strip() not in listed.out
    [token] = (await call("token", "list", "--json")).json
    assert list(token) == list(Token.model_fields) and token["created_by"] == "ann"
    left = datetime.fromisoformat(token["expires_at"]) - clock.now()
    assert timedelta(days=89) < left < timedelta(days=91)


async def test_a_revoked_token_is_not_valid(ledger: Database, call: Any) -> None:
    made = (await call("token", "create", "deploy", "--role", "viewer", "--json")).json
    assert list(made) == list(NewToken.model_fields) and made["expires_at"] is None
    assert (await call("token", "revoke", "deploy")).out == "the token deploy is revoked\n"
    assert await access.holder(operations_on(ledger).context, made["secret"], None) is None
    refuses(await call("token", "revoke", "deploy"), "'deploy'", "`batch token list`")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("create deploy", ["role"]),
        ("create deploy --role king", ["'king'", "viewer, operator, admin"]),
        ("create deploy --role viewer --expires soon", ["--expires", "'soon'", "90d"]),
        ("create deploy --role viewer --expires 0d", ["more than zero"]),
        ("create a/b --role viewer", ["'a/b'", "allowed"]),
        ("create d\u0435ploy --role viewer", ["from a to z"]),  # the e is Cyrillic
        ("create Service --role viewer", ["'Service'", "in the audit"]),
        ("rovoke deploy", ["'rovoke'", "Did you mean 'revoke'?"]),
    ],
)
async def test_an_invalid_token_is_refused(call: Any, words: str, named: list[str]) -> None:
    refuses(await call("token", *words.split()), *named)


async def test_a_name_is_given_once(call: Any) -> None:
    assert (await call("token", "create", "deploy", "--role", "viewer")).code == 0
    refuses(
        await call("token", "create", "deploy", "--role", "admin"), "a token named 'deploy' already"
    )


async def test_no_token_and_no_changes_are_said_in_words(call: Any) -> None:
    assert (await call("token", "list")).err == "batch: there is no token\n"
    assert (await call("changes")).err == "batch: no changes match\n"
    assert (
        (await call("changes", "--json")).json == (await call("token", "list", "--json")).json == []
    )


async def test_changes_say_who_did_what_and_can_be_narrowed_down(
    ledger: Database, call: Any
) -> None:
    await know(ledger, make_task("import"), make_task("report"))
    run = new("import", created_at=clock.now())
    await insert(ledger, run)
    for words in ("pause report", f"cancel {run.id[-8:]}", "resume report"):
        assert (await call(*words.split(), "--note", f"why to {words.split()[0]}")).code == 0
    done = await call("changes")
    assert [line.split()[2:5] for line in done.out.splitlines()[1:]] == [
        ["ann", "cli", "task.resume"],
        ["ann", "cli", "run.cancel"],
        ["ann", "cli", "task.pause"],
    ]
    assert run.id[-8:] in done.out

    notes = [each["note"] for each in (await call("changes", "--json")).json]
    assert notes == ["why to resume", "why to cancel", "why to pause"]

    async def actions(*words: str) -> list[str]:
        return [each["action"] for each in (await call("changes", *words, "--json")).json]

    assert (
        await actions("--task", "import")
        == await actions("--action", "run.cancel")
        == ["run.cancel"]
    )
    assert await actions("--limit", "1") == ["task.resume"]
    assert len(await actions("--since", "1h")) == 3 and await actions("--since", "2999-01-01") == []
    assert list((await call("changes", "--json")).json[0]) == list(Change.model_fields)
    counted = (await call("changes", "--counts", "--json")).json
    assert counted == {
        "by": [
            {"who": "ann", "kind": "pauses", "number": 2},
            {"who": "ann", "kind": "runs", "number": 1},
        ],
        "has_all": True,
    }
    done = await call("changes", "--counts", "--task", "report")
    assert [line.split() for line in done.out.splitlines()] == [
        ["who", "kind", "number"],
        ["ann", "pauses", "2"],
    ]
