"""Incidents of a service over its HTTP API, with the methods of `operations.incidents`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel

from service.batch.ledger.states import IncidentKind
from service.operations.incidents.facet import (
    Acknowledged,
    Incident,
    IncidentDetails,
    IncidentPage,
    Muted,
    SentTest,
)
from service.operations.remote.facets import Facet, path_of


class _Unmuted(BaseModel):
    was_muted: bool


class RemoteIncidents(Facet):
    async def list(
        self,
        state: str = "open",
        kind: IncidentKind | None = None,
        task: str | None = None,
        limit: int = 50,
        after: str | None = None,
    ) -> IncidentPage:
        query = {"state": state, "kind": kind, "task": task, "limit": limit, "after": after}
        return await self._connection.get(IncidentPage, "/incidents", **query)

    async def show(self, incident: str) -> IncidentDetails:
        return await self._connection.get(
            IncidentDetails, path_of("incidents", await self._id(incident))
        )

    async def acknowledge(
        self,
        incident: str,
        note: str,
        quiet_until: datetime | None = None,
        failed_until: datetime | None = None,
    ) -> Acknowledged:
        instants = {"quiet_until": quiet_until, "failed_until": failed_until}
        body = {
            "note": note,
            **{name: at.isoformat() if at else None for name, at in instants.items()},
        }
        path = path_of("incidents", await self._id(incident), "acknowledge")
        return await self._connection.post(Acknowledged, path, body)

    async def reopen(self, incident: str) -> Incident:
        path = path_of("incidents", await self._id(incident), "reopen")
        return await self._connection.post(Incident, path, {})

    async def mute(self, task: str, until: datetime, note: str | None = None) -> Muted:
        body = {"until": until.isoformat(), "note": note}
        return await self._connection.post(Muted, path_of("tasks", task, "mute"), body)

    async def unmute(self, task: str) -> bool:
        return (
            await self._connection.post(_Unmuted, path_of("tasks", task, "unmute"), {})
        ).was_muted

    async def send_test(self, channels: Sequence[str] = ()) -> SentTest:
        return await self._connection.post(SentTest, "/alerts/test", {"channels": list(channels)})

    async def _id(self, incident: str) -> str:
        """The whole id of an open incident of which the last digits are given."""
        if len(incident) > _LONGEST_END:
            return incident
        page = await self.list(limit=200)
        ids = [each.id for each in page.incidents if each.id.endswith(incident)]
        return ids[0] if len(ids) == 1 else incident


_LONGEST_END = 12
