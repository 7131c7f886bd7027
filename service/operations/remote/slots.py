"""Slots of a service over its HTTP API, with the methods of `operations.slots`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from service.errors import InvalidParameters
from service.operations.bulks.bulk import Bulk, Preview
from service.operations.remote.facets import Facet, RemoteBulks, path_of
from service.operations.slots.account import Accounts, SlotOutcome
from service.operations.slots.leaving import LeftSlots
from service.operations.starting.backfill import BackfillCounts, BackfillRequest, BackfillSlot


class RemoteSlots(Facet):
    async def account(
        self,
        since: datetime,
        until: datetime | None = None,
        task: str | None = None,
        on_slot: Callable[[SlotOutcome], None] | None = None,
    ) -> Accounts:
        if on_slot is not None:
            raise InvalidParameters(
                "single slots are listed only beside the ledger: call it there, without --url"
            )
        instants = {"since": since.isoformat(), "until": until.isoformat() if until else None}
        return await self._connection.get(Accounts, "/account", **instants, task=task)

    async def backfill(
        self, request: BackfillRequest, on_slot: Callable[[BackfillSlot], None] | None = None
    ) -> BackfillCounts:
        body = {
            "since": request.since.isoformat(),
            "until": request.until.isoformat(),
            "redo": request.redo,
        }
        many = {"many": request.allow_many, "and_after": request.and_after}
        preview = await self._connection.post(
            Preview, path_of("tasks", request.task, "backfill", "preview"), {**body, **many}
        )
        assert preview.counts is not None
        if not request.dry_run:
            path = path_of("tasks", request.task, "backfill")
            bulk = await self._connection.post(Bulk, path, {"preview": preview.id})
            await RemoteBulks(self._connection).carry_out(bulk.id)
        return preview.counts

    async def leave(
        self,
        since: datetime,
        until: datetime,
        note: str | None = None,
        task: str | None = None,
        slots: int | None = None,
        *,
        dry_run: bool = False,
    ) -> LeftSlots:
        body = {**_interval(since, until, task), "note": note, "slots": slots, "dry_run": dry_run}
        return await self._connection.post(LeftSlots, "/slots/leave", body)

    async def reopen(self, since: datetime, until: datetime, task: str | None = None) -> LeftSlots:
        return await self._connection.post(
            LeftSlots, "/slots/reopen", _interval(since, until, task)
        )


def _interval(since: datetime, until: datetime, task: str | None) -> dict[str, str | None]:
    return {"since": since.isoformat(), "until": until.isoformat(), "task": task}
