"""What is likely to be a mistake in the loaded tasks. No database is asked."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from service import clock
from service.batch.cron.cron import Schedule
from service.batch.lint.clock_changes import DAY, effects
from service.batch.lint.lint import findings
from service.batch.tasks.registry import Task
from service.errors import UnknownTask
from service.escaping import echoed
from service.operations.context import Loaded
from service.operations.results import Result


class LintSlot(Result):
    """A slot to come; `local` is the same instant in the schedule's zone, `mark` what a clock change does to it."""

    slot: datetime
    local: datetime
    mark: str | None


class LintFinding(Result):
    """`severity`: error (the file can't be used), warning (to be changed) or note (to be known)."""

    severity: str
    rule: str
    message: str


class Checked(Result):
    """A task, or a file that can't be used, which has no `task`; `words`: its schedule in words."""

    task: str | None
    source: str
    schedule: str | None
    timezone: str | None
    words: str | None
    next: list[LintSlot]
    findings: list[LintFinding]


def check(loaded: Loaded, names: Collection[str], number: int) -> list[Checked]:
    """The tasks by name, all or those of `names`, with `number` next slots; without `names` also the broken files.

    Raises UnknownTask.
    """
    _refuse_unknown(names, loaded)
    chosen = [task for name, task in sorted(loaded.tasks.items()) if not names or name in names]
    files = [] if names else [_broken(file.source, file.error) for file in loaded.broken]
    return [*(_checked(task, number) for task in chosen), *files]


def _refuse_unknown(names: Collection[str], loaded: Loaded) -> None:
    unknown = sorted(set(names) - loaded.tasks.keys())
    if unknown:
        listed = ", ".join(sorted(loaded.tasks)) or "none"
        unusable = f"; can't be used: {', '.join(file.source for file in loaded.broken)}" if loaded.broken else ""
        raise UnknownTask(f"no task is named {echoed(unknown[0])}; the tasks are: {listed}{unusable}")


def _checked(task: Task, number: int) -> Checked:
    schedule = task.schedule
    return Checked(
        task=task.name,
        source=task.source,
        schedule=schedule.cron if schedule else None,
        timezone=schedule.timezone if schedule else None,
        words=schedule.words if schedule else None,
        next=_next(schedule, number) if schedule else [],
        findings=[LintFinding.of(vars(finding)) for finding in findings(task, clock.now())],
    )


def _next(schedule: Schedule, number: int) -> list[LintSlot]:
    slots = list(schedule.following(clock.now(), number))
    if not slots:
        return []
    around = list(effects(schedule, slots[0] - DAY, slots[-1] + DAY))

    def mark(slot: datetime) -> str | None:
        return next((effect.words for effect in around if effect.touches(slot)), None)

    return [LintSlot(slot=slot, local=slot.astimezone(schedule.zone), mark=mark(slot)) for slot in slots]


def _broken(source: str, error: str) -> Checked:
    finding = LintFinding(severity="error", rule="broken", message=error)
    return Checked(task=None, source=source, schedule=None, timezone=None, words=None, next=[], findings=[finding])
