"""Signing on: a node that starts says so in the ledger, and a service says which tasks there
are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.firing import task_sync
from service.batch.ledger import database_time, nodes
from service.batch.nodes.node import Node
from service.batch.tasks.broken_files import BrokenFile, broken_as_json
from service.batch.tasks.discovery import folder_of
from service.batch.tasks.registry import Task
from service.concurrency.offload import offload
from service.database.engine import Database, whole_tables
from service.server import deploys
from service.settings.settings import Settings
from service.versions import application_version, package_version


async def sign_on(
    ledger: Database,
    node: Node,
    tasks: Mapping[str, Task],
    broken: Sequence[BrokenFile],
    settings: Settings,
    version: str | None,
) -> None:
    """Write the node to the ledger, with what it has loaded. `version`: of the application, if it
    is known.
    """
    folder = folder_of(settings.TASKS_DIR)
    node.application = await offload(application_version, version, folder, Path.cwd())
    versions = {"package": package_version(), "application": node.application}
    async with ledger.engine.begin() as connection, whole_tables(connection):
        now = await database_time.now_of(connection)
        if not node.roles.is_worker:  # which may have older code than the services
            await task_sync.record_tasks(connection, await _to_record(connection, node, tasks), now)
        await node.register(connection, tasks, now, broken_as_json(broken))
        if node.roles.fires:
            await deploys.record_start(connection, node.id, settings, versions, now)


async def _to_record(
    connection: AsyncConnection, node: Node, tasks: Mapping[str, Task]
) -> Mapping[str, Task]:
    """The tasks about which this node says what it knows: a process by hand only what no service
    has.

    It may have other code than the services: if that names another pool, no node would claim the
    runs of the task.
    """
    if node.roles.fires:
        return tasks
    known = await nodes.live_tasks(connection)
    return {name: task for name, task in tasks.items() if name not in known}
