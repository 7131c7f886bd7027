"""`batch lint`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from service import clock
from service.cli import complete
from service.cli.options import AsJson, utc, whole
from service.escaping import echoed, line

if TYPE_CHECKING:
    from service.batch.tasks.registry import Task

Row = dict[str, Any]


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

    found = _check(name or [], n)
    if as_json:
        console.show_json(found)
    else:
        _print(found)
    raise SystemExit(1 if _count(found, "error") + _count(found, "warning") else 0)


def _check(names: list[str], n: int) -> list[Row]:
    from service import logs
    from service.batch.tasks.discovery import load_tasks
    from service.batch.tasks.registry import TaskRegistry
    from service.config import get_settings
    from service.errors import UnknownTask

    logs.set_up("CRITICAL")
    broken = load_tasks(get_settings().TASKS_DIR)
    tasks = sorted(TaskRegistry.tasks().values(), key=lambda task: task.name)
    unknown = sorted(set(names) - {task.name for task in tasks})
    if unknown:
        listed = ", ".join(task.name for task in tasks) or "none"
        unusable = f"; can't be used: {', '.join(file.source for file in broken)}" if broken else ""
        raise UnknownTask(f"no task is named {echoed(unknown[0])}; the tasks are: {listed}{unusable}")
    wrong = [] if names else [_broken(file.source, file.error) for file in broken]
    return [*(_row(task, n) for task in tasks if not names or task.name in names), *wrong]


def _row(task: Task, n: int) -> Row:
    from service.batch.lint.lint import findings

    now, schedule = clock.now(), task.schedule
    return {
        "task": task.name,
        "source": task.source,
        "schedule": schedule.cron if schedule else None,
        "timezone": schedule.timezone if schedule else None,
        "words": schedule.words if schedule else None,
        "next": _next(task, n),
        "findings": [vars(finding) for finding in findings(task, now)],
    }


def _next(task: Task, n: int) -> list[Row]:
    from service.batch.lint.clock_changes import DAY, effects

    if task.schedule is None:
        return []
    slots, zone = task.schedule.following(clock.now(), n), task.schedule.zone
    found: list[Row] = [{"slot": slot, "local": slot.astimezone(zone), "mark": None} for slot in slots]
    if found:
        around = list(effects(task.schedule, found[0]["slot"] - DAY, found[-1]["slot"] + DAY))
        for row in found:
            row["mark"] = next((effect.words for effect in around if effect.touches(row["slot"])), None)
    return found


def _broken(source: str, error: str) -> Row:
    nothing = dict.fromkeys(["task", "source", "schedule", "timezone", "words"])
    finding = {"severity": "error", "rule": "broken", "message": error}
    return {**nothing, "source": source, "next": [], "findings": [finding]}


def _count(rows: list[Row], severity: str) -> int:
    return sum(finding["severity"] == severity for row in rows for finding in row["findings"])


def _print(rows: list[Row]) -> None:
    from service import console

    for row in rows:
        title = f"{row['task']} ({row['source']})" if row["task"] else row["source"]
        console.write(console.paint(title, "heading"))
        if row["task"]:
            console.say(f"  {row['words'] or 'Only by hand'}")
        for slot in row["next"]:
            _print_slot(slot)
        shown = {slot["mark"] for slot in row["next"]}
        for finding in row["findings"]:
            if finding["message"] not in shown:
                severity = finding["severity"]
                console.write(f"  {console.paint(severity, severity)}: {line(finding['message'])}")
        console.say()
    console.say(_summary(rows))


def _print_slot(slot: Row) -> None:
    from service import console

    at = utc(slot["slot"])
    local = slot["local"].isoformat(" ")
    same = slot["local"].utcoffset() == slot["slot"].utcoffset()
    console.say(f"    {at}" + ("" if same else f"  {local}") + (f"  {slot['mark']}" if slot["mark"] else ""))


def _summary(rows: list[Row]) -> str:
    tasks = sum(row["task"] is not None for row in rows)
    counts = [(tasks, "task"), *((_count(rows, severity), severity) for severity in ("error", "warning", "note"))]
    return ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in counts)
