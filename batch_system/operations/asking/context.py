"""What each operation needs: the databases, the loaded tasks, the settings, and who asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from batch_system.operations.asking.actor import Actor, Role
from batch_system.redaction import Redaction
from batch_system.settings.settings import Settings

if TYPE_CHECKING:
    from batch_system.batch.retention.retention import Keep
    from batch_system.batch.tasks.broken_files import BrokenFile
    from batch_system.batch.tasks.registry import Task
    from batch_system.operations.asking.databases import Databases


class Loaded(NamedTuple):
    """The tasks that this process has loaded, by name, and the files that can't be used."""

    tasks: Mapping[str, Task] = {}
    broken: Sequence[BrokenFile] = ()


def wake_nothing() -> None:
    """Used outside a service, where no engine has to be woken."""


@dataclass(frozen=True)
class Context:
    """What each operation needs.

    Attributes:
        loaded: Returns the loaded tasks. It is called only when they are needed, because the first
            call may import them.
        actor: Who asks. The name is recorded in the ledger.
        wake: Called after a run was queued, so that a service in this process claims it at once.
        wake_bulks: Called after a bulk was begun, so that a service in this process carries it out.
        node: The id of the service's node in this process; empty outside a service.
        troubles: Returns what is wrong with that node now, by part. The node may be unable to write
            this to the ledger.
    """

    databases: Databases
    loaded: Callable[[], Loaded]
    actor: Actor
    settings: Settings
    wake: Callable[[], None] = wake_nothing
    wake_bulks: Callable[[], None] = wake_nothing
    node: str = ""
    troubles: Callable[[], Mapping[str, str]] = dict

    @property
    def lease_seconds(self) -> float:
        """A process counts as alive for this many seconds after its last sign of life."""
        return self.settings.LEASE_SECONDS

    @property
    def keep(self) -> Keep:
        """Which runs pruning keeps."""
        from batch_system.batch.retention.retention import Keep

        settings = self.settings
        return Keep(
            settings.KEEP_RUNS_DAYS, settings.KEEP_RUNS_PER_TASK, settings.BATCH_KEEP_EVENTS_DAYS
        )

    @cached_property
    def redaction(self) -> Redaction:
        """Masks values that are secret by their names."""
        return Redaction.of(self.settings.BATCH_SECRET_WORDS)

    def followers(self) -> Sequence[str]:
        """The channels that get a message when a person closes an incident."""
        from batch_system.alerts.channels import Channels

        return Channels.of(self.settings, checked=False).followers()


R_co = TypeVar("R_co", covariant=True)


class Performs(Protocol[R_co]):
    """A verb: its answer is what `perform` returns."""

    @property
    def role_needed(self) -> Role:
        """The lowest role that may ask for it."""

    async def perform(self, context: Context) -> R_co:
        """Carry it out."""
