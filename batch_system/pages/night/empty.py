"""The page that replaces Night and the tasks while there is no task: how to make the first one."""

from __future__ import annotations

from batch_system.operations.system import migrations
from batch_system.operations.system.settings import used
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer

FILE = '''from batch_system import BaseTask, get_logger

logger = get_logger(__name__)


class Hello(BaseTask):
    """Says hello every 15 minutes."""

    name = "hello"
    schedule = "*/15 * * * *"

    async def run(self, whom: str = "world") -> str:
        logger.info(f"Hello, {whom}")
        return f"{whom} was greeted"
'''
"""A first task."""


async def show_empty(viewer: Viewer, current: str) -> str:
    """Render the page, which changes by itself with the first task. `current`: the page that it
    replaces.
    """
    context = viewer.operations.context
    shown = {each.name: each.value for each in used(context.settings).settings}
    shell = await shell_of(viewer, current, "No tasks yet")
    return await render(
        "empty.html",
        **shell,
        file=FILE,
        folder=shown["TASKS_DIR"],
        backup_url=shown["BACKUP_URL"],
        migrations=await migrations.list_migrations(context),
        broken=context.loaded().broken,
    )
