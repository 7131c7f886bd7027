"""`batch lint`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import complete
from service.cli.opening import ask
from service.cli.options import AsJson, utc, whole
from service.escaping import line

if TYPE_CHECKING:
    from service.operations.lint import LintedTask, LintSlot


def lint(
    name: Annotated[
        list[str] | None,
        typer.Argument(help="Only these tasks; default: all.", autocompletion=complete.task_names),
    ] = None,
    n: Annotated[
        int, typer.Option("-n", parser=whole(0, 1_000), metavar="NUMBER", help="How many of the next fire times.")
    ] = 5,
    as_json: AsJson = False,
) -> None:
    """Check the tasks: when they fire, what clock changes do to them, policies that don't fit.

    An error is a file that can't be used. A warning is something to change. A note is something to know. The exit code
    is 1 when there is an error or a warning, so that CI can use it. No database is asked.
    """
    from service import console

    checked = ask(lambda operations: operations.tasks.lint(name or [], n))
    if as_json:
        console.show_json([task.model_dump() for task in checked])
    else:
        _print(checked)
    raise SystemExit(1 if _count(checked, "error") + _count(checked, "warning") else 0)


def _count(checked: Sequence[LintedTask], severity: str) -> int:
    return sum(finding.severity == severity for task in checked for finding in task.findings)


def _print(checked: Sequence[LintedTask]) -> None:
    from service import console

    for task in checked:
        title = f"{task.task} ({task.source})" if task.task else task.source
        console.write(console.paint(title, "heading"))
        if task.task:
            console.say(f"  {task.words or 'Only by hand'}")
        for slot in task.next:
            _print_slot(slot)
        shown = {slot.mark for slot in task.next}
        for finding in task.findings:
            if finding.message not in shown:
                console.write(f"  {console.paint(finding.severity, finding.severity)}: {line(finding.message)}")
        console.say()
    console.say(_summary(checked))


def _print_slot(slot: LintSlot) -> None:
    from service import console

    same = slot.local.utcoffset() == slot.slot.utcoffset()
    local = "" if same else f"  {slot.local.isoformat(' ')}"
    console.say(f"    {utc(slot.slot)}{local}" + (f"  {slot.mark}" if slot.mark else ""))


def _summary(checked: Sequence[LintedTask]) -> str:
    tasks = sum(task.task is not None for task in checked)
    counts = [(tasks, "task"), *((_count(checked, severity), severity) for severity in ("error", "warning", "note"))]
    return ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in counts)
