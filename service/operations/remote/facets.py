"""The facets of the operations of a service over its HTTP API, with the methods of the facets of
`Operations`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from service.batch.ledger.states import FINAL
from service.errors import InvalidParameters
from service.operations.asking.filter import RunFilter
from service.operations.asking.results import (
    Line,
    LogBlock,
    Node,
    Quarantined,
    RunDetails,
    RunNow,
    RunsAfter,
    Slot,
    Started,
)
from service.operations.backups.catalogue import BackupSummary
from service.operations.bulks.bulk import Bulk, BulkAction, Preview
from service.operations.night.status import Status
from service.operations.people.access import NewToken, Token
from service.operations.people.changes import ChangePage
from service.operations.remote.connection import ERRORS, Connection
from service.operations.runs.read import LAST_LINES, MOST_RUNS, RunOrTask, RunPage
from service.operations.runs.run_log import POLL_SECONDS, LogPage
from service.operations.runs.waiting import Chain, Waiting
from service.operations.system.pools import PoolState
from service.operations.tasks.results import Paused, Resumed, ResumedAhead, TaskDetails, TaskSummary


class _TaskList(BaseModel):
    tasks: list[TaskSummary]


class _Slots(BaseModel):
    slots: list[Slot]


class _Quarantine(BaseModel):
    items: list[Quarantined]


class _Nodes(BaseModel):
    nodes: list[Node]


class _Pools(BaseModel):
    pools: list[PoolState]


class _Tokens(BaseModel):
    tokens: list[Token]


class _Backups(BaseModel):
    backups: list[BackupSummary]
    warnings: list[str]


class Facet:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        raise InvalidParameters(
            "this needs the machine of the service: call it there, without --url"
        )


def path_of(*parts: str) -> str:
    return "".join(f"/{quote(part, safe='')}" for part in parts)


class RemoteTasks(Facet):
    async def list(self, with_others: bool = False) -> Sequence[TaskSummary]:
        """Those that any process of the service has loaded: this one has none, so `with_others`
        changes nothing.
        """
        return (await self._connection.get(_TaskList, "/tasks")).tasks

    async def show(self, name: str) -> TaskDetails:
        return await self._connection.get(TaskDetails, path_of("tasks", name))

    async def next_slots(self, name: str, number: int) -> Sequence[Slot]:
        return (
            await self._connection.get(_Slots, path_of("tasks", name, "schedule"), n=number)
        ).slots

    async def pause(
        self, name: str, note: str | None = None, until: datetime | None = None
    ) -> Paused:
        body = {"note": note, "until": until.isoformat() if until is not None else None}
        return await self._connection.post(Paused, path_of("tasks", name, "pause"), body)

    async def resume(self, name: str, note: str | None = None) -> Resumed:
        return await self._connection.post(
            Resumed, path_of("tasks", name, "resume"), {"note": note}
        )

    async def resume_ahead(self, note: str | None = None) -> Mapping[str, datetime]:
        return (await self._connection.post(ResumedAhead, "/tasks/resume", {"note": note})).tasks

    async def pause_of(self, name: str) -> Paused | None:
        task = await self.show(name)
        if task.paused_at is None:
            return None
        by, until = task.paused_by or "somebody", task.paused_until
        return Paused(at=task.paused_at, by=by, is_new=False, until=until)


class RemoteRuns(Facet):
    async def list(
        self,
        wanted: RunFilter | None = None,
        limit: int = 50,
        after: str | None = None,
        *,
        by_slot: bool = False,
    ) -> RunPage:
        query = (wanted or RunFilter()).model_dump(mode="json", exclude_defaults=True)
        if by_slot:
            name = query.pop("task")
            return await self._connection.get(
                RunPage, path_of("tasks", name, "runs"), **query, limit=limit, after=after
            )
        return await self._connection.get(
            RunPage, "/runs", **query, limit=min(limit, MOST_RUNS), after=after
        )

    async def find(self, given: str) -> RunOrTask:
        if given in {task.name for task in (await self._connection.get(_TaskList, "/tasks")).tasks}:
            return RunOrTask("task", given)
        return RunOrTask("run", (await self.current(given)).id)

    async def show(self, given: str, last_lines: int = LAST_LINES) -> RunDetails:
        details = await self._connection.get(RunDetails, path_of("runs", given))
        return details.model_copy(update={"log": details.log[-last_lines:] if last_lines else []})

    async def current(self, given: str) -> RunNow:
        return await self._connection.get(RunNow, path_of("runs", given, "now"))

    async def get(self, run_id: str) -> RunNow | None:
        try:
            return await self.current(run_id)
        except ERRORS["not_found"]:
            return None

    async def cancel(
        self, given: str, wait_seconds: float = 0.0, note: str | None = None
    ) -> RunNow:
        body = {"wait": min(wait_seconds, 25.0), "note": note}
        return await self._connection.post(RunNow, path_of("runs", given, "cancel"), body)

    async def comes_after(self, given: str) -> RunsAfter:
        return await self._connection.get(RunsAfter, path_of("runs", given, "after"))

    async def retry(
        self,
        given: str,
        *,
        from_the_beginning: bool = False,
        and_after: bool = False,
        note: str | None = None,
    ) -> RunNow:
        body = {"from_the_beginning": from_the_beginning, "and_after": and_after, "note": note}
        return await self._connection.post(RunNow, path_of("runs", given, "retry"), body)

    async def acknowledge(self, given: str, note: str) -> RunNow:
        return await self._connection.post(
            RunNow, path_of("runs", given, "acknowledge"), {"note": note}
        )

    async def waiting(self, given: str) -> Waiting:
        return await self._connection.get(Waiting, path_of("runs", given, "blocker"))

    async def chain(self, given: str) -> Chain:
        return await self._connection.get(Chain, path_of("runs", given, "chain"))

    async def start(
        self,
        task: str,
        params: Mapping[str, Any],
        slot: datetime | None = None,
        key: str | None = None,
        at: datetime | None = None,
        note: str | None = None,
    ) -> Started:
        body: dict[str, Any] = {
            "parameters": dict(params),
            "slot": slot.isoformat() if slot else None,
        }
        body |= {"at": at.isoformat()} if at is not None else {}
        body |= {"note": note} if note is not None else {}
        headers = {"Idempotency-Key": key} if key is not None else {}
        return await self._connection.post(
            Started, path_of("tasks", task, "runs"), body, headers=headers
        )

    async def follow(self, given: str) -> AsyncGenerator[RunNow]:
        while True:
            now = await self.current(given)
            given = now.id
            yield now
            if now.state in FINAL:
                return
            await asyncio.sleep(POLL_SECONDS)

    async def log(self, given: str, follow: bool = False) -> AsyncGenerator[LogBlock | str]:
        run = (await self.current(given)).id
        after: str | None = None
        while True:
            state = (
                await self.current(run)
            ).state  # first: a final state comes with the last lines
            while True:
                page = await self.log_page(run, after)
                after = page.after
                for block in _blocks(page):
                    yield block
                if page.is_end:
                    break
            if not follow or state in FINAL:
                yield state
                return
            await asyncio.sleep(POLL_SECONDS)

    async def log_page(
        self,
        given: str,
        after: str | None = None,
        limit: int = 500,
        level: str = "DEBUG",
        text: str | None = None,
    ) -> LogPage:
        query = {"after": after, "limit": limit, "level": level, "q": text}
        return await self._connection.get(LogPage, path_of("runs", given, "log"), **query)


def _blocks(page: LogPage) -> list[LogBlock]:
    """The lines of a page, with one block for each attempt."""
    lines: dict[int, list[Line]] = {}
    for line in page.lines:
        lines.setdefault(line.attempt, []).append(Line.of(dict(line)))
    return [LogBlock(fence=0, attempt=attempt, lines=theirs) for attempt, theirs in lines.items()]


class RemoteBulks(Facet):
    async def preview(self, action: BulkAction, wanted: RunFilter) -> Preview:
        body = {"action": action, "filter": wanted.model_dump(mode="json", exclude_defaults=True)}
        return await self._connection.post(Preview, "/runs/bulk", body)

    async def begin(
        self, id: str, action: str, note: str | None = None, task: str | None = None
    ) -> Bulk:
        return await self._connection.post(Bulk, path_of("runs", "bulk", id), {"note": note})

    async def get(self, id: str) -> Bulk:
        return await self._connection.get(Bulk, path_of("runs", "bulk", id))

    async def carry_out(self, id: str) -> None:
        """Wait until the service has carried it out."""
        while (await self.get(id)).finished_at is None:
            await asyncio.sleep(POLL_SECONDS)


class RemotePools(Facet):
    async def list(self) -> Sequence[PoolState]:
        return (await self._connection.get(_Pools, "/pools")).pools


class RemoteQuarantine(Facet):
    async def list(self, given: str | None = None, limit: int = 1_000) -> Sequence[Quarantined]:
        if given is None:
            return (
                await self._connection.get(_Quarantine, "/quarantine", limit=min(limit, 1_000))
            ).items
        return (await self._connection.get(_Quarantine, path_of("runs", given, "quarantine"))).items

    async def redrive(
        self, given: str, items: Sequence[str] | None = None, note: str | None = None
    ) -> Started:
        body = {"items": list(items) if items else None, "note": note}
        return await self._connection.post(Started, path_of("runs", given, "redrive"), body)


class RemoteNodes(Facet):
    async def list(self) -> Sequence[Node]:
        return (await self._connection.get(_Nodes, "/nodes")).nodes

    async def living(self, with_workers: bool = False) -> Sequence[Node]:
        return [
            node
            for node in (await self._connection.get(Status, "/status")).nodes
            if with_workers or node.fires
        ]

    async def has(self, task: str) -> bool:
        return any(task in node.tasks for node in await self.living())


class RemoteChanges(Facet):
    async def list(
        self, limit: int = 50, after: str | None = None, **conditions: Any
    ) -> ChangePage:
        instants = {
            k: v.isoformat() if isinstance(v, datetime) else v for k, v in conditions.items()
        }
        return await self._connection.get(
            ChangePage, "/changes", limit=limit, after=after, **instants
        )


class RemoteAccess(Facet):
    async def create_token(
        self, name: str, role: str, valid_for: timedelta | None = None
    ) -> NewToken:
        days = None if valid_for is None else max(1, round(valid_for / timedelta(days=1)))
        body = {"name": name, "role": role, "expires_in_days": days}
        return await self._connection.post(NewToken, "/tokens", body)

    async def tokens(self) -> Sequence[Token]:
        return (await self._connection.get(_Tokens, "/tokens")).tokens

    async def revoke_token(self, name: str) -> Token:
        return await self._connection.send("DELETE", Token, path_of("tokens", name))


class RemoteBackups(Facet):
    async def list(self, warn: Callable[[str], None]) -> Sequence[BackupSummary]:
        answer = await self._connection.get(_Backups, "/backups")
        for warning in answer.warnings:
            warn(warning)
        return answer.backups


class RemoteMigrations(Facet):
    """Migrations are a matter of the machine of the service."""
