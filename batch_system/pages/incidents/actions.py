"""What a person does about an incident: retry its runs, the newest one first, or acknowledge it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from starlette.requests import Request

from batch_system.batch.ledger.states import OF_RUNS
from batch_system.operations.bulks import retrying
from batch_system.operations.bulks.retrying import RetryPlan
from batch_system.pages.frame import formatting
from batch_system.pages.frame.answers import GoTo, back
from batch_system.pages.frame.confirm import Confirm, Field, Option, confirm
from batch_system.pages.frame.forms import (
    TYPED_FROM,
    check_number,
    instant_of,
    preview_of,
    verb_of,
    whole_id,
)
from batch_system.pages.frame.viewer import Viewer
from batch_system.pages.runs.bulks import by_task
from batch_system.verbs.bulks import BeginBulk, ShowBulk
from batch_system.verbs.incidents import AcknowledgeIncident, ReopenIncident, ShowIncident
from batch_system.verbs.run_changes import RetryRun

CHANGES = {
    "service.deploy": "a new version was deployed",
    "service.start": "a service was started",
    "settings.change": "a setting was changed",
    "schedule.change": "the schedule was changed",
    "task.change": "the task's file or policies were changed",
}
# The clock of the database may be a little behind; it allows seven days.
_LEFT = "It leaves “Needs a person”, with your name and note."
_ACKNOWLEDGED = (
    "Its runs leave “Needs a person” and stand under “Dealt with”, with your name and note. They "
    "stay failed in every count, and can still be retried."
)
QUIET = {
    "no": None,
    "hour": timedelta(hours=1),
    "day": timedelta(days=1),
    "week": timedelta(days=7, minutes=-5),
}


async def ask_to_retry(request: Request, viewer: Viewer) -> str:
    """Say what a retry of all failed runs means, and offer to try the newest one first."""
    with_same = request.query_params.get("same") == "1"
    plan = await retrying.plan_retry(
        viewer.operations.context, whole_id(request, "incident"), with_same_error=with_same
    )
    number = plan.preview.count
    if not number:
        words = (
            "No failed run of this incident is open: all were retried, made good or acknowledged."
        )
        return await confirm(viewer, "night", Confirm("Nothing to retry", [words], "", "Back", "/"))
    every = "the run" if number == 1 else f"all {number:,} runs"
    options = [
        Option(
            "trial",
            "The newest one first",
            f"If it succeeds, Night offers to retry the other {number - 1:,}.",
        ),
        Option(
            "all", f"{every[0].upper()}{every[1:]}", "They wait behind every slot that is on time."
        ),
    ]
    fields = [Field("note", "Why", "It is recorded with the change.")]
    if number > TYPED_FROM:
        fields.append(Field("number", f"To retry all, enter their number, {number}", kind="text"))
    asked = Confirm(
        f"Retry {every} of {plan.task}?",
        [_changed_since(plan), plan.error],
        "Retry",
        "Leave them" if number > 1 else "Leave it",
        "/",
        facts=_facts(plan, viewer),
    )
    hidden = Field("preview", "", kind="hidden", value=plan.preview.id)
    newest = Field("newest", "", kind="hidden", value=plan.newest or "")
    chosen = options if number > 1 else options[1:]
    return await confirm(
        viewer, "night", asked.with_options("which", chosen).with_fields(*fields, hidden, newest)
    )


def _changed_since(plan: RetryPlan) -> str:
    if not plan.changed:
        return "Nothing has changed since the last failure: the same error is likely."
    changes = formatting.sentence_list([CHANGES[each] for each in plan.changed])
    return f"Since the last failure {changes}."


def _facts(plan: RetryPlan, viewer: Viewer) -> list[tuple[str, str]]:
    facts = [("Runs", f"{plan.preview.count:,}"), *by_task(plan.preview)]
    first, last = plan.preview.first, plan.preview.last
    if first is not None and last is not None and first.slot is not None and last.slot is not None:
        slots = [
            formatting.moment(each.slot, viewer.zone, viewer.now)
            for each in (last, first)
            if each.slot
        ]
        facts.append(
            ("Slots", slots[0] if plan.preview.count == 1 else f"{slots[0]} to {slots[1]}")
        )
    facts.append(("Attempt", f"number {plan.attempt} of the newest"))
    if plan.p50 is not None:
        all_of_them = formatting.duration(plan.p50 * plan.preview.count)
        together = f", {all_of_them} in all one after the other" if plan.preview.count > 1 else ""
        facts.append(("Takes", f"about {formatting.duration(plan.p50)} each{together}"))
    facts.append(("Kept", "the earlier attempts, their errors and their logs"))
    return facts


async def retry(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Retry the newest run, or all of the preview."""
    if fields.get("which") == "trial":
        run = await viewer.operations(
            verb_of(RetryRun, {"note": fields.get("note", ""), "run": fields.get("newest", "")})
        )
        return GoTo(f"/runs/{run.id}")
    bulk = await viewer.operations(ShowBulk(preview=preview_of(fields)))
    check_number(bulk.count, fields)
    await viewer.operations(verb_of(BeginBulk, fields, preview=bulk.id))
    return GoTo(f"/bulks/{bulk.id}")


async def ask_to_acknowledge(request: Request, viewer: Viewer) -> str:
    """Ask what is being done about it, and whether the same error may open another incident."""
    incident = await viewer.operations(ShowIncident(incident=whole_id(request, "incident")))
    what = incident.task or incident.subject or incident.kind
    asked = Confirm(
        f"Acknowledge {what}?",
        [_ACKNOWLEDGED if incident.kind in OF_RUNS else _LEFT, incident.text],
        "Acknowledge",
        "Leave it open",
        "/",
        facts=[("Happened", formatting.counted(incident.count, "time"))],
    )
    options = [
        Option("no", "If the same error comes again, show it at once"),
        Option("hour", "Stay quiet about this error for an hour"),
        Option("day", "Stay quiet about this error for a day", "This ends with the first success."),
        Option(
            "week", "Stay quiet about this error for a week", "This ends with the first success."
        ),
    ]
    note = Field("note", "What is done about it, or why nothing has to be done", is_needed=True)
    seen = Field("failed_until", "", kind="hidden", value=incident.last_at.isoformat())
    return await confirm(
        viewer, "night", asked.with_options("quiet", options).with_fields(note, seen)
    )


async def acknowledge(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Acknowledge the incident: those of its runs that had failed when the question was shown."""
    quiet = QUIET.get(fields.get("quiet", "no"))
    until = viewer.now + quiet if quiet is not None else None
    seen = instant_of("failed_until", fields)
    incident = whole_id(request, "incident")
    done = await viewer.operations(
        verb_of(
            AcknowledgeIncident, fields, incident=incident, quiet_until=until, failed_until=seen
        )
    )
    if done.still_open:
        return GoTo(f"/incidents/{incident}?acknowledged={done.runs}&still_open={done.still_open}")
    return back(fields, "/")


async def reopen(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Undo an acknowledgement."""
    await viewer.operations(ReopenIncident(incident=whole_id(request, "incident")))
    return back(fields, "/")
