"""Parts of one run on pages of their own: the traceback of an attempt, the log as text, and its
quarantine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from batch_system import escaping
from batch_system.errors import UnknownRun
from batch_system.operations.asking.results import LogBlock
from batch_system.operations.runs import quarantine, read, run_log
from batch_system.pages.frame.answers import GoTo
from batch_system.pages.frame.confirm import Confirm, Field, confirm
from batch_system.pages.frame.forms import verb_of, whole_id
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.run_changes import RedriveRun
from batch_system.verbs.runs import RunAsItIs

MOST_BYTES = 100_000_000
"""A log is cut in a download after this many bytes; `batch log` prints all of it."""
LONGEST_LINE = 100_000
NOTE = Field("note", "Why", "It is recorded with the change.")


async def show_attempt(request: Request, viewer: Viewer) -> str:
    """The error of an attempt, with its traceback."""
    run = await read.show(viewer.operations.context, request.path_params["run"], 0)
    given = request.path_params["fence"]
    attempt = next((each for each in run.attempts if str(each.fence) == given), None)
    if attempt is None:
        raise UnknownRun(f"the run {run.id} has no such attempt that has ended")
    error = attempt.error or {}
    words = f"{error.get('type', '')}: {error.get('message', '')}" if error else attempt.outcome
    return await render(
        "traceback.html",
        **await shell_of(viewer, "runs", f"{run.task} · Attempt {attempt.number}"),
        heading=f"Attempt {attempt.number} of {run.task}",
        back=f"/runs/{run.id}",
        back_words=f"Run {run.id[-8:]}",
        facts=[("Ended", attempt.outcome), ("Error", words)],
        traceback=error.get("traceback") or "",
    )


async def download_log(request: Request, viewer: Viewer) -> Response:
    """The log as plain text, block by block."""
    run = await viewer.operations(RunAsItIs(run=request.path_params["run"]))
    blocks = run_log.blocks(viewer.operations.context, run.id, follow=False)
    first = await anext(blocks)  # raises errors before anything is sent
    name = quote(f"{run.task}-{run.id[-8:]}.txt")
    headers = {"Content-Disposition": f"attachment; filename={name}"}
    return StreamingResponse(
        _text(first, blocks), media_type="text/plain; charset=utf-8", headers=headers
    )


async def _text(
    first: LogBlock | str, blocks: AsyncIterator[LogBlock | str]
) -> AsyncIterator[bytes]:
    """The lines of the blocks. Control characters in them are visible escapes."""
    sent = 0
    block: LogBlock | str | None = first
    while isinstance(block, LogBlock):
        text = "".join(
            f"{escaping.line(line.at)} {escaping.line(line.level.upper()):<8} "
            f"{escaping.lines(escaping.brief(line.text, LONGEST_LINE))}\n"
            for line in block.lines
        ).encode("utf-8", "replace")
        sent += len(text)
        yield text
        if sent > MOST_BYTES:
            yield b"The rest is left out here: `batch log` prints all of it.\n"
            return
        block = await anext(blocks, None)


async def ask_to_redrive(request: Request, viewer: Viewer) -> str:
    """Say what a redrive does. `?item=` the key of one item; without it, all that are left."""
    run = await viewer.operations(RunAsItIs(run=whole_id(request, "run")))
    item = request.query_params.get("item")
    left = [
        each
        for each in await quarantine.list_items(viewer.operations.context, run.id)
        if each.redriven_by is None
    ]
    number = len([each for each in left if item in (None, each.item)])
    what = "the item" if number == 1 else f"all {number:,} items"
    back = f"/runs/{run.id}#quarantine"
    if not number:
        words = ["It was processed again since, or another run has set it aside."]
        return await confirm(
            viewer, "runs", Confirm("Nothing to re-drive", words, "", "Back", back)
        )
    words = [
        "A new run processes only these items again, with the parameters and the slot of this run.",
        "What fails again is set aside by the new run.",
    ]
    shown = escaping.brief(item or left[0].item, 200)
    facts = [
        ("Task", run.task),
        ("Item" if number == 1 else "Items", shown if number == 1 else f"{number:,}"),
    ]
    leave = "Leave it" if number == 1 else "Leave them"
    asked = Confirm(f"Re-drive {what} of {run.task}?", words, "Re-drive", leave, back, facts=facts)
    return await confirm(viewer, "runs", asked.with_fields(NOTE))


async def redrive(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Queue a run for one item, or for all that are left."""
    item = request.query_params.get("item")
    items = [item] if item is not None else None
    started = await viewer.operations(
        verb_of(RedriveRun, fields, run=whole_id(request, "run"), items=items)
    )
    return GoTo(f"/runs/{started.id}")
