"""Changes of many runs: a preview of what the filter of the list finds, the start, and how far a
bulk is.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request

from batch_system.batch.ledger.states import ACTIVE
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.bulks.bulk import STATES
from batch_system.operations.bulks.results import BulkAction, Preview
from batch_system.pages.frame import formatting
from batch_system.pages.frame.answers import GoTo
from batch_system.pages.frame.confirm import Confirm, Field, confirm
from batch_system.pages.frame.forms import (
    TYPED_FROM,
    check_number,
    preview_of,
    verb_of,
    whole_id,
)
from batch_system.pages.frame.render import render
from batch_system.pages.frame.shell import shell_of
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.runs.run_filter import address, conditions_of, given_in, words_of
from batch_system.verbs.bulks import BeginBulk, PreviewBulk, ShowBulk, UndoBulk

SAYS = {
    "retry": "Each gets a new attempt, which goes on after its last checkpoint, and waits behind "
    "every slot on time.",
    "cancel": "What they have committed stays committed. Their slots count as cancelled.",
    "acknowledge": "They stay failed, and no longer count as something that needs a person.",
    "reopen": "They count again as something that needs a person, and so do their incidents.",
}
UNDOES = {
    "retry": "A run that has ended since stays as it is.",
    "cancel": "A run that somebody has retried since stays as it is.",
    "acknowledge": "A run that was made good since stays as it is.",
}


async def ask(action: BulkAction, request: Request, viewer: Viewer) -> str:
    """Say which runs of the filter would be changed. The preview keeps their ids, so it does not
    include later runs.
    """
    given, chosen = given_in(request.query_params), _chosen_in(request)
    conditions = {"run": chosen} if chosen else conditions_of(given, viewer)
    if states := conditions.get("state"):
        conditions["state"] = [state for state in states if state in STATES[action]] or states
    back = address(given)
    preview = await viewer.operations(PreviewBulk(action=action, filter=RunFilter.of(**conditions)))
    if not preview.count:
        which = "None of the chosen runs" if chosen else "None of the runs of this filter"
        words = f"{which} is in a state in which it can be changed: {_states(action)}."
        return await confirm(
            viewer, "runs", Confirm(f"Nothing to {action}", [words], "", "Back", back)
        )
    of = ("Chosen", f"{len(chosen):,}") if chosen else ("Filter", words_of(given, viewer))
    return await _confirm(viewer, preview, [SAYS[action]], of, back)


async def ask_to_undo(request: Request, viewer: Viewer) -> str:
    """Say which runs of a bulk would be changed back."""
    bulk = await viewer.operations(ShowBulk(preview=whole_id(request, "bulk")))
    preview = await viewer.operations(UndoBulk(preview=bulk.id))
    back = f"/bulks/{bulk.id}"
    words = UNDOES[bulk.action]
    if not preview.count:
        return await confirm(viewer, "runs", Confirm("Nothing to undo", [words], "", "Back", back))
    of = ("Undoes", f"{bulk.action} of {formatting.counted(bulk.count, 'run')} by {bulk.actor}")
    return await _confirm(viewer, preview, [SAYS[preview.action], words], of, back)


async def _confirm(
    viewer: Viewer, preview: Preview, words: list[str], of: tuple[str, str], back: str
) -> str:
    """Ask about a preview. `of`: what it was made of."""
    action, what = preview.action, formatting.counted(preview.count, "run")
    facts = [of, ("Runs", f"{preview.count:,}"), *by_task(preview)]
    for name, run in (("Newest", preview.first), ("Oldest", preview.last)):
        if run is not None:
            at = formatting.moment(run.slot or run.created_at, viewer.zone, viewer.now)
            facts.append((name, f"{run.task} {at}, {run.state}"))
    fields = [
        Field("note", "Why", "It is recorded with the change.", is_needed=action == "acknowledge")
    ]
    if preview.count > TYPED_FROM:
        fields.append(
            Field(
                "number", f"Enter the number of runs, {preview.count}", kind="text", is_needed=True
            )
        )
    asked = Confirm(
        f"{action.capitalize()} {what}?",
        words,
        f"{action.capitalize()} {what}",
        "Leave it" if preview.count == 1 else "Leave them",
        back,
    )
    hidden = Field("preview", "", kind="hidden", value=preview.id)
    return await confirm(viewer, "runs", asked.with_facts(facts).with_fields(*fields, hidden))


def _chosen_in(request: Request) -> list[str]:
    """The ids of the runs that were chosen one by one. A line of several runs has all their ids."""
    lines = request.query_params.getlist("run")
    return list(dict.fromkeys(run for line in lines for run in line.split(",") if run))


def by_task(preview: Preview) -> list[tuple[str, str]]:
    """How many runs of each task a preview is about, if there are several tasks."""
    if len(preview.tasks) < 2:
        return []
    rest = preview.count - sum(preview.tasks.values())
    numbers = [f"{number:,} of {task}" for task, number in preview.tasks.items()]
    return [("Tasks", ", ".join([*numbers, *([f"{rest:,} of others"] if rest else [])]))]


def _states(action: str) -> str:
    states = STATES[action]
    return "active" if states == frozenset(ACTIVE) else " or ".join(sorted(states))


async def begin(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Begin the change of the runs of the preview."""
    bulk = await viewer.operations(ShowBulk(preview=preview_of(fields)))
    check_number(bulk.count, fields)
    await viewer.operations(verb_of(BeginBulk, fields, preview=bulk.id))
    return GoTo(f"/bulks/{bulk.id}")


async def show_bulk(request: Request, viewer: Viewer) -> str:
    """How far a bulk is."""
    bulk = await viewer.operations(ShowBulk(preview=whole_id(request, "bulk")))
    return await render(
        "bulk.html",
        **await shell_of(viewer, "runs", f"Bulk {bulk.action}"),
        bulk=bulk,
        share=bulk.position / bulk.count if bulk.count else 1.0,
    )
