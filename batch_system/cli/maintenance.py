"""`batch pause`, `resume`, `mute` and `unmute`, of one task or of many, and `batch maintenance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system.cli.asked import asks
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, Note, OptionalTaskName
from batch_system.words import short, utc

if TYPE_CHECKING:
    from batch_system.operations.asking.selection import Selection
    from batch_system.operations.maintenance.results import Maintenance
    from batch_system.verbs.following import Operations
    from batch_system.verbs.maintenance import MuteTasks, PauseTasks

OPTIONS = {"begins_at": "--from", "until": "--until/--for", "all_tasks": "--all"}


def _check(name: str | None, asked: Selection, begins_at: datetime | None = None) -> None:
    """Raises BadParameter unless the options say either one task or one selection of tasks."""
    if (name is not None) != asked.is_empty:
        raise typer.BadParameter("give the name of a task, or --tag, or --pool, or --all")
    if name is not None and begins_at is not None:
        raise typer.BadParameter("--from needs --tag, --pool or --all")


@asks("asked", "batch_system.verbs.maintenance:PauseTasks", names=OPTIONS)
def pause(asked: PauseTasks, name: OptionalTaskName = None, as_json: AsJson = False) -> None:
    """Stop firing a task, or all tasks of a selection, until `batch resume`, or for a while: then a
    running service resumes it.

    Active runs stop at their next checkpoint, and continue after the pause. Slots during the pause
    are recorded as missed, and never caught up. If the task or the selection is paused already,
    --for and --until change the end. With --from, the pause of a selection is planned.
    """
    from batch_system import console
    from batch_system.verbs.tasks import PauseTask

    _check(name, asked, asked.begins_at)
    if name is None:
        _show_begun(ask(lambda operations: operations(asked)), as_json)
        return
    of_task = PauseTask(name=name, until=asked.until, note=asked.note)
    paused = ask(lambda operations: operations(of_task))
    ends = f", until {utc(paused.until)}" if paused.until is not None else ""
    if as_json:
        console.show_json(paused)
    elif paused.is_new:
        console.say(f"{name} is paused by {paused.by}{ends}")
    else:
        console.say(f"{name} was paused already, at {utc(paused.at)} by {paused.by}{ends}")


@asks("asked", "batch_system.operations.asking.selection:Selection", names=OPTIONS)
def resume(
    asked: Selection,
    name: OptionalTaskName = None,
    ahead: Annotated[
        bool,
        typer.Option(
            "--ahead", help="Instead of NAME: all tasks that don't fire because a clock was ahead."
        ),
    ] = False,
    note: Note = None,
    as_json: AsJson = False,
) -> None:
    """Fire a task again, from now on: one that is paused, or that does not fire because a clock was
    ahead.

    With --tag, --pool or --all, the pause of that selection ends; tasks that were paused by their
    name stay paused. The runs that the pause has stopped continue. A clock that was ahead has fired
    slots before their time; those that have a run get no other one.
    """
    from batch_system import console
    from batch_system.verbs.tasks import ResumeTask, ResumeTasksAhead

    if ahead:
        if name is not None or not asked.is_empty:
            raise typer.BadParameter("--ahead is about all tasks: give nothing beside it")
        resumed = ask(lambda operations: operations(ResumeTasksAhead(note=note))).tasks
        if as_json:
            console.show_json(resumed)
            return
        for task, until in sorted(resumed.items()):
            console.say(f"{task} fires again; a clock was ahead, up to {utc(until)}")
        if not resumed:
            console.say("no clock was ahead: each task fires")
        return
    _check(name, asked)
    if name is None:
        ended = ask(_end_windows("pause", asked, note))
        _show_ended(ended, "no such pause lasts; `batch maintenance list` shows all", as_json)
        return
    found = ask(lambda operations: operations(ResumeTask(name=name, note=note)))
    if as_json:
        console.show_json(found)
        return
    if found.ended is not None:
        console.say(
            f"{name} fires again; it was paused at {utc(found.ended.at)} by {found.ended.by}"
        )
    if found.ahead_until is not None:
        console.say(f"{name} fires again; a clock was ahead, up to {utc(found.ahead_until)}")
    if found.ended is None and found.ahead_until is None:
        console.say(f"{name} is not paused")


@asks("asked", "batch_system.verbs.maintenance:MuteTasks", names=OPTIONS)
def mute(asked: MuteTasks, name: OptionalTaskName = None, as_json: AsJson = False) -> None:
    """Send nothing about a task, or all tasks of a selection, for a while, such as during
    maintenance.

    The tasks go on, and incidents are opened as ever. What is still open at the end is sent then.
    With --all, nothing is sent about anything else either, such as a lost node.
    """
    from batch_system import console
    from batch_system.verbs.tasks import MuteTask

    _check(name, asked, asked.begins_at)
    if name is None:
        _show_begun(ask(lambda operations: operations(asked), needs_tasks=False), as_json)
        return
    of_task = MuteTask(name=name, until=asked.until, note=asked.note)
    muted = ask(lambda operations: operations(of_task), needs_tasks=False)
    if as_json:
        console.show_json(muted)
    else:
        console.say(f"nothing is sent about {muted.task} until {utc(muted.until)}")


@asks("asked", "batch_system.operations.asking.selection:Selection", names=OPTIONS)
def unmute(asked: Selection, name: OptionalTaskName = None, as_json: AsJson = False) -> None:
    """Send messages about a task, or the tasks of a selection, again.

    With --tag, --pool or --all, the mute of that selection ends; tasks that were muted by their
    name stay muted.
    """
    from batch_system import console
    from batch_system.verbs.tasks import UnmuteTask

    _check(name, asked)
    if name is None:
        ended = ask(_end_windows("mute", asked), needs_tasks=False)
        _show_ended(ended, "no such mute lasts; `batch maintenance list` shows all", as_json)
        return
    unmuted = ask(lambda operations: operations(UnmuteTask(name=name)), needs_tasks=False)
    if as_json:
        console.show_json({"task": name, "was_muted": unmuted.was_muted})
    else:
        console.say(
            f"messages about {name} are sent again" if unmuted.was_muted else f"{name} is not muted"
        )


def list_(as_json: AsJson = False) -> None:
    """List the pauses and mutes of many tasks that last or are planned."""
    from batch_system import console
    from batch_system.verbs.maintenance import ListMaintenance

    windows = ask(lambda operations: operations(ListMaintenance()), needs_tasks=False).windows
    if as_json:
        console.show_json(windows)
    elif windows:
        rows = [
            {**each.model_dump(), "selection": _selection(each), "id": short(each.id)}
            for each in windows
        ]
        columns = ["state", "kind", "selection", "begins_at", "ends_at", "by", "note", "id"]
        console.show_fitted(rows, columns, ["note", "selection"])
    else:
        console.warn("batch: nothing is paused or muted by a selection, and nothing is planned")


def end(
    window: Annotated[
        str,
        typer.Argument(
            metavar="WINDOW",
            help="The id of the window, or its last digits, as the list shows them.",
        ),
    ],
    note: Note = None,
    as_json: AsJson = False,
) -> None:
    """End a pause or a mute of many tasks, or call off a planned one."""
    from batch_system.errors import InvalidParameters
    from batch_system.escaping import echoed
    from batch_system.verbs.maintenance import EndMaintenance, ListMaintenance

    async def work(operations: Operations) -> list[Maintenance]:
        listed = (await operations(ListMaintenance())).windows
        ids = [each.id for each in listed if each.id.endswith(window)]
        if len(ids) != 1:
            found = "no window" if not ids else "several windows"
            raise InvalidParameters(
                f"{found} that last or are planned end in {echoed(window)}; `batch maintenance "
                "list` shows all"
            )
        return [await operations(EndMaintenance(window=ids[0], note=note))]

    _show_ended(ask(work, needs_tasks=False), "", as_json)


def _end_windows(
    kind: str, asked: Selection, note: str | None = None
) -> Callable[[Operations], Any]:
    """End the windows of a selection that last now."""

    async def work(operations: Operations) -> list[Maintenance]:
        from batch_system.verbs.maintenance import EndMaintenance, ListMaintenance

        listed = (await operations(ListMaintenance())).windows
        now = [each for each in listed if each.kind == kind and each.state == "now"]
        meant = [each for each in now if (each.tag, each.pool) == (asked.tag, asked.pool)]
        return [await operations(EndMaintenance(window=each.id, note=note)) for each in meant]

    return work


def in_words(window: Maintenance) -> str:
    """A sentence about a window that lasts or is planned."""
    what = "paused" if window.kind == "pause" else "muted"
    begins = f" from {utc(window.begins_at)}" if window.state == "planned" else ""
    ends = f" until {utc(window.ends_at)}" if window.ends_at is not None else " until it is ended"
    note = f": {window.note}" if window.note else ""
    planned = "planned: " if window.state == "planned" else ""
    return f"{planned}{_meant(window)} {what} by {window.by}{begins}{ends}{note}"


def _show_begun(window: Maintenance, as_json: bool) -> None:
    from batch_system import console

    if as_json:
        console.show_json(window)
    else:
        console.say(in_words(window) if window.is_new else f"already so: {in_words(window)}")


def _show_ended(ended: Sequence[Maintenance], nothing: str, as_json: bool) -> None:
    from batch_system import console

    if as_json:
        console.show_json(ended)
        return
    for each in ended:
        console.say(f"the {each.kind} of {_selection(each)} by {each.by} has ended")
    if not ended:
        console.say(nothing)


def _selection(window: Maintenance) -> str:
    if window.tag is not None:
        return f"tag {window.tag}"
    return f"pool {window.pool}" if window.pool is not None else "all tasks"


def _meant(window: Maintenance) -> str:
    number = f"{window.tasks:,} task{'' if window.tasks == 1 else 's'}"
    name = "" if window.tag is window.pool is None else f" ({_selection(window)})"
    return f"{number}{name} {'is' if window.tasks == 1 else 'are'}"
