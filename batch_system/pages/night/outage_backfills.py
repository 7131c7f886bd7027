"""The backfill of all tasks with missed slots of an interval: one preview, and one start."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request

from batch_system.operations.bulks import outage_backfills
from batch_system.pages.frame.answers import GoTo
from batch_system.pages.frame.forms import ID, TYPED_FROM, check_number, instant_of, verb_of
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.bulks import BeginBulk
from batch_system.web.problems import Refused


async def ask(request: Request, viewer: Viewer) -> str:
    """The preview for `?since=&until=`, the first and the last slot, or how far the backfills of
    `?begun=` are.
    """
    if begun := request.query_params.get("begun"):
        found = await outage_backfills.begun(viewer.operations.context, _ids(begun))
        return await render(
            "backfills.html", **await shell_of(viewer, "night", "Backfill"), begun=found
        )
    since, until = (instant_of(name, request.query_params) for name in ("since", "until"))
    if since is None or until is None:
        raise Refused(422, "since and until: the first and the last slot are needed")
    plan = await outage_backfills.plan(viewer.operations.context, since, until)
    return await render(
        "backfills.html",
        **await shell_of(viewer, "night", "Backfill"),
        begun=None,
        plan=plan,
        is_typed=plan.count > TYPED_FROM,
    )


async def begin(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Begin the backfills that the page has shown. If the form is sent twice, they begin once,
    because each preview can begin only once.
    """
    ids = _ids(fields.get("previews", ""))
    known = await outage_backfills.begun(viewer.operations.context, ids)
    check_number(sum(each.count for each in known), fields)
    note = verb_of(BeginBulk, fields, preview=ids[0]).note
    await outage_backfills.begin(viewer.operations.context, ids, note)
    return GoTo(f"/backfill?begun={','.join(ids)}")


def _ids(given: str) -> list[str]:
    """The ids of previews, as the page has written them. The operation refuses too many."""
    ids = given.split(",")
    if not all(ID.fullmatch(each) for each in ids):
        raise Refused(422, "previews: allowed are the ids that the page has shown")
    return ids
