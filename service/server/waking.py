"""Waking: what a service does when runs were queued, by its own process or by another one."""

from __future__ import annotations

from collections.abc import Mapping

from service.batch.execution.local_engine import LocalEngine
from service.batch.nodes.roles import Roles
from service.batch.placing.placing import Placing
from service.batch.tasks.registry import Task


class Waking:
    """Wakes the engine of a service, and what places tickets."""

    engine: LocalEngine
    placing: Placing | None = None

    def __init__(self, roles: Roles) -> None:
        self._roles = roles

    def wake(self) -> None:
        """Runs may be able to start, here or where tickets are placed. Returns at once."""
        self.engine.wake()
        if self.placing is not None:
            self.placing.wake()

    def on_queued(self, pools: frozenset[str] | None) -> None:
        """Another process has queued runs of these pools; None: it may be any pool."""
        if pools is None or pools & self._roles.pools:
            self.engine.wake()
        if self.placing is not None and (pools is None or pools - self._roles.pools):
            self.placing.wake()

    def takes(self, tasks: Mapping[str, Task], queued: Mapping[str, int]) -> bool:
        """Whether the engine takes this many runs of each task by itself, so that no other node has
        to know of them.

        `tasks`: those that the service has loaded, by name.
        """
        return not self._roles.on_tickets and self.engine.capacity.holds(tasks, queued)
