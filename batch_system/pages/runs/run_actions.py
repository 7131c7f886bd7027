"""What a person does with one run: cancel it, retry it, acknowledge it. Each action asks first, on
a page of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request

from batch_system.batch.ledger.states import ACTIVE
from batch_system.pages.frame.answers import GoTo, back
from batch_system.pages.frame.confirm import Confirm, Field, Option, confirm
from batch_system.pages.frame.forms import verb_of, whole_id
from batch_system.pages.frame.viewer import Viewer
from batch_system.verbs.run_changes import AcknowledgeRun, CancelRun, RetryRun
from batch_system.verbs.runs import RunAsItIs

NOTE = Field("note", "Why", "It is recorded with the change, and people read it afterwards.")


async def ask_to_cancel(request: Request, viewer: Viewer) -> str:
    """Say what a cancel does, and ask."""
    run = await viewer.operations(RunAsItIs(run=whole_id(request, "run")))
    if run.state not in ACTIVE:
        ended = [f"The run has ended: it is {run.state}."]
        return await confirm(
            viewer, "runs", Confirm("Nothing to cancel", ended, "", "Back", f"/runs/{run.id}")
        )
    if run.state == "running":
        kept = (
            f"The {run.count:,} items so far that are committed stay so."
            if run.count
            else "What is committed stays so."
        )
        words = [f"The run stops at its next checkpoint. {kept}"]
    else:
        words = [
            "It waits, and no further attempt is made. What earlier attempts have committed stays "
            "so."
        ]
    if run.slot is not None:
        words.append("Its slot counts as cancelled. A retry can run it later.")
    asked = Confirm(
        f"Cancel this run of {run.task}?",
        words,
        "Cancel the run",
        "Keep it running",
        f"/runs/{run.id}",
    )
    return await confirm(viewer, "runs", asked.with_fields(NOTE))


async def cancel(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Cancel the run."""
    run = await viewer.operations(verb_of(CancelRun, fields, run=whole_id(request, "run"), wait=0))
    return back(fields, f"/runs/{run.id}")


OF_OTHERS = [
    Option(
        "resume",
        "Go on after its last checkpoint",
        "What earlier attempts have committed is not done again.",
    ),
    Option(
        "anew",
        "From the beginning",
        "Its checkpoints and its items in quarantine are deleted first.",
    ),
]
OF_SPLIT = [
    Option(
        "resume",
        "Run the parts that did not succeed",
        "Parts that have succeeded are not done again.",
    ),
    Option("anew", "From the beginning", "Its parts are deleted, and it is split anew."),
]
"""How a run is retried."""


async def ask_to_retry(request: Request, viewer: Viewer) -> str:
    """Say what a retry does, and ask whether it should continue or begin anew."""
    run = await viewer.operations(RunAsItIs(run=whole_id(request, "run")))
    if run.state in ACTIVE:
        goes_on = [f"The run has not ended: it is {run.state}."]
        return await confirm(
            viewer, "runs", Confirm("Nothing to retry", goes_on, "", "Back", f"/runs/{run.id}")
        )
    options = OF_SPLIT if run.is_split else OF_OTHERS
    options = options[1:] if run.state == "succeeded" else options
    asked = Confirm(
        f"Retry this run of {run.task}?",
        [f"It is {run.state}. It waits behind every slot that is on time."],
        "Retry the run",
        "Leave it",
        f"/runs/{run.id}",
    )
    return await confirm(viewer, "runs", asked.with_options("how", options).with_fields(NOTE))


async def retry(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Queue the run for a new attempt."""
    run = await viewer.operations(
        verb_of(
            RetryRun,
            fields,
            run=whole_id(request, "run"),
            from_the_beginning=fields.get("how") == "anew",
            and_after=False,
        )
    )
    return back(fields, f"/runs/{run.id}")


async def ask_to_acknowledge(request: Request, viewer: Viewer) -> str:
    """Ask what is done about the failure."""
    run = await viewer.operations(RunAsItIs(run=whole_id(request, "run")))
    asked = Confirm(
        f"Acknowledge this failed run of {run.task}?",
        [
            "It stays failed, and no longer counts as something that needs a person.",
            run.reason or "",
        ],
        "Acknowledge",
        "Leave it open",
        f"/runs/{run.id}",
    )
    return await confirm(viewer, "runs", asked.with_fields(NOTE._replace(is_needed=True)))


async def acknowledge(request: Request, viewer: Viewer, fields: Mapping[str, str]) -> GoTo:
    """Say that a person takes care of the run."""
    run = await viewer.operations(verb_of(AcknowledgeRun, fields, run=whole_id(request, "run")))
    return back(fields, f"/runs/{run.id}")
