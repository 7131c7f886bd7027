"""The pages about nodes, pools and changes."""

from __future__ import annotations

from starlette.requests import Request

from batch_system.operations.asking.results import Node
from batch_system.operations.system import nodes as processes
from batch_system.operations.system.nodes import troubles_of
from batch_system.operations.system.results import PoolState
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.system import ListNodes, ListPools

PAGE = 100
MOST_NODES = 200
MOST_POOLS = 50
FILTERS = ("task", "action")
LONGEST_FILTER = 100


async def show_nodes(request: Request, viewer: Viewer) -> str:
    """The pools, and the processes of the service: the living ones, and those that have stopped,
    the newest first.
    """
    alive = {
        node.id: node
        for node in await processes.living(viewer.operations.context, with_workers=True)
    }
    living = set(alive)
    nodes = [
        alive.get(node.id, node)
        for node in list((await viewer.operations(ListNodes())).nodes)[:MOST_NODES]
    ]
    return await render(
        "nodes.html",
        **await shell_of(viewer, "nodes", "Nodes and pools"),
        pools=(await viewer.operations(ListPools())).pools,
        most_pools=MOST_POOLS,
        served_by=_served_by,
        broken=await processes.broken_files(viewer.operations.context),
        busy=await processes.busy(viewer.operations.context),
        all_nodes=sorted(nodes, key=lambda node: node.id not in living),
        troubles=troubles_of(alive.values()),
        states={node.id: _state(node, living) for node in nodes},
        ages={
            node.id: ((node.stopped_at or viewer.now) - node.started_at).total_seconds()
            for node in nodes
        },
    )


def _state(node: Node, living: set[str]) -> tuple[str, str, str]:
    """The style, the icon and the word."""
    state = node.state(node.id in living)
    if state == "silent" and not node.fires and not node.pools:
        return "queued", "hand", "runs by hand"
    return _STATES[state]


_STATES = {
    "running": ("succeeded", "activity", "living"),
    "draining": ("interrupted", "hourglass", "draining"),
    "stopped": ("queued", "power", "stopped"),
    "silent": ("missed", "unplug", "silent"),
    "lost": ("failed", "unplug", "lost"),
}


def _served_by(pool: PoolState) -> str:
    """What serves a pool, in words."""
    kind, _, number = (pool.served_by or "nodes").partition(":")
    if kind == "services":
        return "the event loop and the threads of each service"
    if kind == "process":
        children = (
            f"up to {number} child processes"
            if number
            else "a child process for each run, one for each core,"
        )
        return f"{children} on each node"
    return "its nodes: batch work"
