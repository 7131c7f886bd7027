"""The functions that the workers of a Dask cluster call: `plugin` makes the plugin that hosts a
node there, and `use` takes a ticket.

Services name these two functions to the cluster (batch_system/dask/remote.py), so a worker with an
older package has to understand their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from batch_system.server.hosted_node import HostedNode

if TYPE_CHECKING:
    from batch_system.dask.plugin import NodePlugin

NANNY_SECONDS = 1.5
"""How long a drain lasts in a worker with a nanny, which kills the process four seconds after
asking it to end.
"""

_nodes: list[HostedNode] = []
"""The node of this process. While one replaces another, the last one counts."""


def plugin(pools: list[str]) -> NodePlugin:
    """The plugin that hosts a node of these pools."""
    from batch_system.dask.plugin import NodePlugin

    def make(
        places: int, has_nanny: bool, on_tasks: Callable[[dict[str, list[str]]], None]
    ) -> HostedNode:
        node = HostedNode(frozenset(pools), places, on_tasks, NANNY_SECONDS if has_nanny else None)
        _nodes[:] = [node]
        return node

    return NodePlugin(make)


def use(task: str, seconds: float, by: str) -> bool:
    """Use a ticket, in a thread of the worker. Returns whether more runs of the task may be able to
    start.
    """
    return _nodes[-1].use(task, seconds, by) if _nodes else False
