"""What a node does: whether it fires schedules, and the pools whose runs it claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batch_system.settings.pools import DEFAULT_POOL, Pool


@dataclass(frozen=True)
class Roles:
    """What a node does.

    Attributes:
      fires: Whether it is a service: it fires schedules, rescues the runs of dead nodes, and
          writes what it knows of its tasks to the ledger. Other nodes only execute runs.
      pools: The names of the pools whose runs it claims. A node that claims none executes only
          the runs that it is given.
      on_tickets: Whether it claims only for tickets, which services place.
    """

    fires: bool
    pools: frozenset[str]
    on_tickets: bool = False

    @classmethod
    def of_service(cls, pools: Mapping[str, Pool]) -> Roles:
        """The roles of a service: it claims the runs of the default pool, and of the pools with
        children on each node.

        `pools`: what serves each pool by name, by the settings.
        """
        return cls(
            True,
            frozenset(
                {DEFAULT_POOL} | {name for name, pool in pools.items() if pool.kind == "process"}
            ),
        )

    @property
    def is_worker(self) -> bool:
        """Whether it only executes the runs of its pools, beside the services."""
        return not self.fires and bool(self.pools)


SERVICE = Roles(True, frozenset({DEFAULT_POOL}))
"""The roles of a service without further pools."""
BY_HAND = Roles(False, frozenset())
"""The roles of a process that executes one run, such as `batch run`."""
