"""The page of the slots that are unaccounted for: what the number in Night's sentence counts, one
by one.
"""

from __future__ import annotations

from urllib.parse import urlencode

from starlette.requests import Request

from batch_system.batch.account.slots import Kind
from batch_system.operations.night import unaccounted
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.frame.window import window_in, window_in_words

WHAT_TO_DO = {
    Kind.GAP: "A service has gone past it, so nothing will run it by itself. "
    "A backfill does its work.",
    Kind.LATE: "The service is busy or stuck. "
    "It handles the slot as soon as it goes on; its log may say why.",
    Kind.DUE: "No running service has the task: start one, or bring the file of the task back.",
}


async def show_unaccounted(request: Request, viewer: Viewer) -> str:
    """The slots of a window as Night has it, the newest first."""
    since, until, _ = window_in(request, viewer)
    found = await unaccounted.slots(viewer.operations.context, since, until, str(viewer.zone))
    ends = {
        "since": found.since.isoformat(),
        **({"until": found.until.isoformat()} if found.until else {}),
    }
    return await render(
        "unaccounted.html",
        **await shell_of(viewer, "night", "Unaccounted slots"),
        found=found,
        number=len(found.slots) + found.more,
        window=window_in_words(found.since, found.until, found.as_of, viewer),
        query=urlencode(ends),
        ends=ends,
        what_to_do=WHAT_TO_DO,
    )
