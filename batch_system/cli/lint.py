"""`batch lint`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from batch_system.cli import complete
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, whole
from batch_system.escaping import line
from batch_system.words import dates_in_words, utc

if TYPE_CHECKING:
    from batch_system.operations.tasks.lint import LintedTask, LintSlot


def lint(
    name: Annotated[
        list[str] | None,
        typer.Argument(
            help="The tasks to check; default: all.", autocompletion=complete.task_names
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option(
            "-n", parser=whole(0, 1_000), metavar="NUMBER", help="The number of next slots to show."
        ),
    ] = 5,
    as_json: AsJson = False,
) -> None:
    """Check the tasks for likely mistakes, and show when they fire and how clock changes affect
    them.

    An error is a file that can't be used, or a task that waits for one that does not exist. A
    warning is something to change. A note is something to know. The exit code is 1 if there is an
    error or a warning, so that CI can use it. The ledger is read only for awaited tasks that are
    not in TASKS_DIR, and for the nodes of pools of which the settings say nothing; it may be out of
    reach.
    """
    from batch_system import console
    from batch_system.operations.tasks import lint

    tasks = ask(lambda operations: lint.lint(operations.context, name or [], n))
    if as_json:
        console.show_json(list(tasks))
    else:
        _print(tasks)
    raise SystemExit(1 if _count(tasks, "error") + _count(tasks, "warning") else 0)


def _count(tasks: Sequence[LintedTask], severity: str) -> int:
    return sum(finding.severity == severity for task in tasks for finding in task.findings)


def _print(tasks: Sequence[LintedTask]) -> None:
    from batch_system import console

    for task in tasks:
        title = f"{task.task} ({task.source})" if task.task else task.source
        console.write(console.paint(title, "heading"))
        if task.task:
            console.say(f"  {task.words or 'No schedule: it is started by hand'}")
            if task.given:
                console.say(f"  {task.given}, which became {task.schedule}")
        for slot in task.next:
            _print_slot(slot)
        if task.left_out:
            console.say(f"    left out: {dates_in_words(task.left_out)}")
        marks = {slot.mark for slot in task.next}
        for finding in task.findings:
            if finding.message not in marks:
                console.write(
                    f"  {console.paint(finding.severity, finding.severity)}: "
                    f"{line(finding.message)}"
                )
        console.say()
    console.say(_summary(tasks))


def _print_slot(slot: LintSlot) -> None:
    from batch_system import console

    is_utc = slot.local.utcoffset() == slot.slot.utcoffset()
    local = "" if is_utc else f"  {slot.local.isoformat(' ')}"
    console.say(f"    {utc(slot.slot)}{local}" + (f"  {slot.mark}" if slot.mark else ""))


def _summary(tasks: Sequence[LintedTask]) -> str:
    usable = sum(task.task is not None for task in tasks)
    counts = [
        (usable, "task"),
        *((_count(tasks, severity), severity) for severity in ("error", "warning", "note")),
    ]
    return ", ".join(f"{number} {noun}{'' if number == 1 else 's'}" for number, noun in counts)
