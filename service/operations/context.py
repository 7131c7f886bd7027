"""What every facet of the operations needs: the databases, the loaded tasks, and the name of the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from service.batch.retention.retention import Keep
from service.errors import UnknownTask
from service.escaping import echoed
from service.operations.databases import Databases

if TYPE_CHECKING:
    from service.batch.tasks.discovery import BrokenFile
    from service.batch.tasks.registry import Task


class Loaded(NamedTuple):
    """The tasks that this process has loaded, by name, and the files that can't be used."""

    tasks: Mapping[str, Task] = {}
    broken: Sequence[BrokenFile] = ()


def wake_nothing() -> None:
    """Used outside a service, where no engine has to be woken."""


@dataclass(frozen=True)
class Context:
    """The context of all facets.

    Attributes:
        loaded: Returns the loaded tasks. It is called only when they are needed, because the first call may import
            them.
        actor: The name of the user who asks, which is recorded in the ledger.
        lease_seconds: A process counts as alive for so many seconds after its last sign of life.
        keep: Which runs pruning keeps.
        wake: Called after a run was queued, so that a service in this process claims it at once.
        node: The id of the service's node in this process; empty outside a service.
    """

    databases: Databases
    loaded: Callable[[], Loaded]
    actor: str
    lease_seconds: float
    keep: Keep
    wake: Callable[[], None] = wake_nothing
    node: str = ""

    def task(self, name: str) -> Task:
        """The loaded task of this name. Raises UnknownTask, whose message lists the names of the loaded tasks."""
        tasks = self.loaded().tasks
        if name not in tasks:
            names = ", ".join(sorted(tasks)) or "none"
            raise UnknownTask(f"no task is named {echoed(name)}; the tasks are: {names}")
        return tasks[name]
