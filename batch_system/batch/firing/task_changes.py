"""Changes of tasks between the code that the ledger knows and the code that a process has loaded:
their files and policies. The audit has them, so that a later failure can be compared. Alone,
because `task_sync` only writes what is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.people.audit import By
from batch_system.batch.ledger.tables import tasks
from batch_system.batch.tasks.registry import Task


@dataclass(frozen=True)
class Change:
    """A task whose file or policies are others than those that the ledger has."""

    by: By
    task: str
    before: dict[str, Any]
    after: dict[str, Any]
    since: datetime

    async def record(self, connection: AsyncConnection, now: datetime) -> None:
        """Add it to the audit. Of several nodes that see it at the same time, one does so."""
        encoded = json.dumps([self.before, self.after], sort_keys=True, default=str).encode()
        digest = hashlib.sha256(encoded).hexdigest()[:16]
        key = f"declared {self.task} {digest} {self.since.isoformat()}"
        await audit.record(
            connection,
            self.by,
            "task.change",
            now,
            task=self.task,
            before=self.before,
            after=self.after,
            key=key,
        )


async def of_tasks(
    connection: AsyncConnection, loaded: Mapping[str, Task], node: str
) -> list[Change]:
    """The changes of the tasks that the ledger knows."""
    theirs = json_rows.is_among(tasks.c.name, loaded, connection.dialect.name)
    columns = (tasks.c.name, tasks.c.policies, tasks.c.digest, tasks.c.last_seen_at)
    by = By(f"node {node}" if node else "service")
    changes = []
    for row in await connection.execute(select(*columns).where(theirs)):
        task = loaded[row.name]
        old: dict[str, Any] = row.policies if isinstance(row.policies, dict) else {}
        new = task.policies.as_json()
        names = sorted(name for name in new if name in old and old[name] != new[name])
        before: dict[str, Any] = {"policies": {name: old[name] for name in names}}
        after: dict[str, Any] = {"policies": {name: new[name] for name in names}}
        if row.digest is not None and task.digest is not None and row.digest != task.digest:
            before["file"], after["file"] = row.digest, task.digest
        if names or "file" in after:
            changes.append(Change(by, row.name, before, after, row.last_seen_at))
    return changes
