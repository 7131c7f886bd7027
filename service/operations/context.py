"""What every facet of the operations needs: the databases, the loaded tasks, and who asks."""

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


def nothing() -> None:
    """For operations outside a service, where no engine has to be woken."""


@dataclass(frozen=True)
class Context:
    """Handed to each facet.

    Attributes:
        loaded: Returns the loaded tasks. It is called only where they are needed, since the first call may import them.
        actor: Who asks, as it will stand in the ledger: a user's name.
        lease_seconds: A process that was not seen for so long does not count as living.
        keep: Which runs pruning keeps.
        wake: Called when a run was queued, so that a service in this process looks for it at once.
        node: The id of the service's node in this process; empty outside a service.
    """

    databases: Databases
    loaded: Callable[[], Loaded]
    actor: str
    lease_seconds: float
    keep: Keep
    wake: Callable[[], None] = nothing
    node: str = ""

    def task(self, name: str) -> Task:
        """A loaded task. Raises UnknownTask, which lists the names there are."""
        tasks = self.loaded().tasks
        if name not in tasks:
            names = ", ".join(sorted(tasks)) or "none"
            raise UnknownTask(f"no task is named {echoed(name)}; the tasks are: {names}")
        return tasks[name]
