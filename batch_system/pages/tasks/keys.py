"""The page of a task's keys: how many runs of each value of its limit's parameter go on and
wait.
"""

from __future__ import annotations

from starlette.requests import Request

from batch_system.batch.ledger.key_counts import MOST_COUNTED
from batch_system.batch.tasks.limit import MOST
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.tasks import ListKeys


async def show_keys(request: Request, viewer: Viewer) -> str:
    """A page of keys, which are in the order of their names."""
    name = request.path_params["task"]
    found = await viewer.operations(
        ListKeys(name=name, after=request.query_params.get("after", ""))
    )
    return await render(
        "keys.html",
        **await shell_of(viewer, "tasks", f"Keys of {name}"),
        task=name,
        found=found,
        keys=found.keys,
        unlimited=MOST,
        most_counted=MOST_COUNTED,
    )
