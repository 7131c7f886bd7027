"""What every facet of the operations needs: the databases, the loaded tasks, and the name of the
caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from service.batch.retention.retention import Keep
from service.operations.asking.actor import Actor
from service.operations.asking.databases import Databases
from service.redaction import Redaction
from service.settings.access import SECRET_WORDS

if TYPE_CHECKING:
    from service.batch.tasks.broken_files import BrokenFile
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
        loaded: Returns the loaded tasks. It is called only when they are needed, because the first
            call may import them.
        actor: Who asks. The name is recorded in the ledger.
        lease_seconds: A process counts as alive for this many seconds after its last sign of life.
        keep: Which runs pruning keeps.
        wake: Called after a run was queued, so that a service in this process claims it at once.
        wake_bulks: Called after a bulk was begun, so that a service in this process carries it out.
        node: The id of the service's node in this process; empty outside a service.
        troubles: Returns what is wrong with that node now, by part, which it may not be able to
            write to the ledger.
        redaction: Masks values that are secret by their names.
        followers: Returns the channels that are told when a person has closed an incident.
    """

    databases: Databases
    loaded: Callable[[], Loaded]
    actor: Actor
    lease_seconds: float
    keep: Keep
    wake: Callable[[], None] = wake_nothing
    wake_bulks: Callable[[], None] = wake_nothing
    node: str = ""
    troubles: Callable[[], Mapping[str, str]] = dict
    redaction: Redaction = field(default_factory=lambda: Redaction(SECRET_WORDS))
    followers: Callable[[], Sequence[str]] = list
