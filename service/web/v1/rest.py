"""The status, the account, the audit, nodes and tokens."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Header, Path, Query, Request, Response
from pydantic import Field

from service.concurrency.offload import offload
from service.operations.asking.actor import Role
from service.operations.asking.cursors import Cursor
from service.operations.asking.filter import TASK_NAME, Instant
from service.operations.asking.results import Node, Result
from service.operations.night.results import Night
from service.operations.night.status import Status
from service.operations.people.access import NewToken, Token
from service.operations.people.changes import MOST_CHANGES, ChangePage
from service.operations.slots.account import Accounts
from service.operations.slots.leaving import LeftSlots
from service.operations.system.pools import PoolState
from service.web.v1.requests import Admin, Body, NeededNote, Operator, Viewer, guard_of, router

rest = router("service")
tokens = router("tokens")

LONGEST_DAYS = 3_650

PASSING: dict[str, Any] = {
    **dict.fromkeys(("as_of", "last_beat"), True),
    "slots": {"recounted_until"},
    "backup": {"age"},
    "next": {"until"},
    "late": {"__all__": {"elapsed", "eta"}},
}
"""What changes in the answer about the night while nothing happens."""


class AccountQuery(Body):
    """Which slots an account is about."""

    since: Instant
    until: Instant | None = None
    task: str | None = Field(None, pattern=TASK_NAME)


class MissedInterval(Body):
    """The missed ranges that lie within an interval, both ends included, except those of pauses."""

    since: Instant
    until: Instant
    task: str | None = Field(None, pattern=TASK_NAME, description="Default: all tasks.")


class Leave(MissedInterval):
    """That nothing has to be done about missed slots, and why."""

    note: NeededNote | None = Field(None, description="It is needed, unless `dry_run` is true.")
    slots: int | None = Field(
        None, ge=0, description="How many slots they are. It is refused if there are others."
    )
    dry_run: bool = Field(False, description="Change nothing. No note is needed then.")


class NightQuery(Body):
    """The window of time: 31 days at most, within the last ten years."""

    since: Instant | None = Field(
        None,
        description="Before the end of the window, 31 days at most. "
        "Default: 18:00 of the day before, in the zone.",
    )
    until: Instant | None = Field(
        None, description="Default, and in place of a later instant: now."
    )
    zone: str = Field("UTC", max_length=100, description="The IANA name of a time zone.")


class ChangeQuery(Body):
    """Which events of the audit are wanted."""

    since: Instant | None = None
    until: Instant | None = None
    task: str | None = Field(None, pattern=TASK_NAME)
    action: str | None = Field(
        None, pattern=r"^[a-z_.]{1,60}$", description="Only events such as `run.cancel`."
    )
    limit: int = Field(50, ge=1, le=MOST_CHANGES)
    after: Cursor | None = None


class NodeList(Result):
    """The processes of the service, also those that have stopped lately, the newest first."""

    nodes: list[Node]


class PoolList(Result):
    """The pools of all tasks, nodes and settings, the default one first."""

    pools: list[PoolState]


class TokenList(Result):
    """All tokens, without their secrets."""

    tokens: list[Token]


class TokenRequest(Body):
    """A token to make."""

    name: str = Field(
        min_length=1,
        max_length=100,
        pattern=r"^[A-Za-z0-9_.@+-]([A-Za-z0-9_ .@+-]*[A-Za-z0-9_.@+-])?$",
    )
    role: Role
    expires_in_days: int | None = Field(None, ge=1, le=LONGEST_DAYS)


@rest.get("/status")
async def status(operations: Viewer) -> Status:
    """Whether something needs a person, as the night says it; the services, and the newest
    backup.
    """
    return await operations.status()


@rest.get(
    "/night",
    response_model=Night,
    responses={304: {"description": "The answer is the one that the caller has."}},
)
async def night(
    operations: Viewer,
    query: Annotated[NightQuery, Query()],
    response: Response,
    known: Annotated[str | None, Header(alias="If-None-Match", max_length=100)] = None,
) -> Night | Response:
    """What happened in a window of time, and what needs a person. The ETag is the hash of the
    answer but its time.
    """
    answer = await operations.night(query.since, query.until, query.zone)
    tag = await offload(_tag_of, answer)
    if known == tag:
        return Response(status_code=304, headers={"etag": tag})
    response.headers["etag"] = tag
    return answer


def _tag_of(answer: Night) -> str:
    facts = answer.model_dump_json(exclude=PASSING)
    return f'"{hashlib.sha256(facts.encode()).hexdigest()[:32]}"'


@rest.get("/account")
async def account(operations: Viewer, query: Annotated[AccountQuery, Query()]) -> Accounts:
    """What became of every slot of an interval."""
    return await operations.slots.account(query.since, query.until, query.task)


@rest.post("/slots/leave")
async def leave_slots(operations: Operator, body: Leave) -> LeftSlots:
    """Say that nothing has to be done about the missed ranges that lie within an interval, and
    why.
    """
    return await operations.slots.leave(**body.model_dump())


@rest.post("/slots/reopen")
async def reopen_slots(operations: Operator, body: MissedInterval) -> LeftSlots:
    """Undo that for the missed ranges within an interval."""
    return await operations.slots.reopen(**body.model_dump())


@rest.get("/changes")
async def list_changes(operations: Viewer, query: Annotated[ChangeQuery, Query()]) -> ChangePage:
    """A page of the audit: who changed what, when and from where; the newest first."""
    return await operations.changes.list(**query.model_dump())


@rest.get("/nodes")
async def list_nodes(operations: Viewer) -> NodeList:
    """The processes of the service."""
    return NodeList(nodes=list(await operations.nodes.list()))


@rest.get("/pools")
async def list_pools(operations: Viewer) -> PoolList:
    """Where runs execute: what serves each pool, its nodes, and how many runs are running and
    waiting.
    """
    return PoolList(pools=list(await operations.pools.list()))


@tokens.get("/tokens")
async def list_tokens(operations: Admin) -> TokenList:
    """All tokens, the newest first."""
    return TokenList(tokens=list(await operations.access.tokens()))


@tokens.post("/tokens", status_code=201)
async def create_token(operations: Admin, body: TokenRequest) -> NewToken:
    """Make a token. Its secret is in this answer, and nowhere else."""
    days = body.expires_in_days
    return await operations.access.create_token(
        body.name, body.role, timedelta(days=days) if days else None
    )


@tokens.delete("/tokens/{name}")
async def revoke_token(
    request: Request, operations: Admin, name: Annotated[str, Path(min_length=1, max_length=100)]
) -> Token:
    """Revoke a token, by its name or id. It is refused everywhere within two seconds."""
    revoked = await operations.access.revoke_token(name)
    guard_of(request).forget()
    return revoked
