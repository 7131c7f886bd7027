"""Checks the loaded tasks for likely mistakes. No database is used."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from service import clock
from service.batch.cron.cron import Schedule
from service.batch.lint.clock_changes import DAY, effects
from service.batch.lint.lint import findings
from service.batch.tasks.registry import Task
from service.errors import UnknownTask
from service.operations.context import Loaded
from service.operations.results import Result


class LintSlot(Result):
    """A future slot; `local`: the same instant in the schedule's zone. `mark`: the effect of a clock change on it."""

    slot: datetime
    local: datetime
    mark: str | None


class LintFinding(Result):
    """A likely mistake. `severity`: error (the file can't be used), warning (should be changed) or note."""

    severity: str
    rule: str
    message: str


class LintedTask(Result):
    """The findings about a task, or about a file that can't be used, for which `task` is None.

    `words`: the schedule in words.
    """

    task: str | None
    source: str
    schedule: str | None
    timezone: str | None
    words: str | None
    next: list[LintSlot]
    findings: list[LintFinding]


def check(
    loaded: Loaded, names: Collection[str], number: int, served: Collection[str] | None = None
) -> list[LintedTask]:
    """Check all tasks, or those of `names`; each result has up to `number` future slots.

    Without `names` the results include the files that can't be used. `served`: see `findings`. Raises UnknownTask.
    """
    _refuse_unknown(names, loaded)
    chosen = [task for name, task in sorted(loaded.tasks.items()) if not names or name in names]
    files = [] if names else [_broken(file.source, file.error) for file in loaded.broken]
    return [*(_linted(task, number, served) for task in chosen), *files]


def _refuse_unknown(names: Collection[str], loaded: Loaded) -> None:
    unknown = sorted(set(names) - loaded.tasks.keys())
    if unknown:
        error = UnknownTask.named(unknown[0], loaded.tasks)
        unusable = f"; can't be used: {', '.join(file.source for file in loaded.broken)}" if loaded.broken else ""
        raise UnknownTask(f"{error.message}{unusable}")


def _linted(task: Task, number: int, served: Collection[str] | None) -> LintedTask:
    schedule = task.schedule
    return LintedTask(
        task=task.name,
        source=task.source,
        schedule=schedule.cron if schedule else None,
        timezone=schedule.timezone if schedule else None,
        words=schedule.words if schedule else None,
        next=_next_slots(schedule, number) if schedule else [],
        findings=[LintFinding.of(vars(finding)) for finding in findings(task, clock.now(), served)],
    )


def _next_slots(schedule: Schedule, number: int) -> list[LintSlot]:
    slots = list(schedule.following(clock.now(), number))
    if not slots:
        return []
    changes = list(effects(schedule, slots[0] - DAY, slots[-1] + DAY))

    def mark(slot: datetime) -> str | None:
        return next((effect.words for effect in changes if effect.touches(slot)), None)

    return [LintSlot(slot=slot, local=slot.astimezone(schedule.zone), mark=mark(slot)) for slot in slots]


def _broken(source: str, error: str) -> LintedTask:
    finding = LintFinding(severity="error", rule="broken", message=error)
    return LintedTask(task=None, source=source, schedule=None, timezone=None, words=None, next=[], findings=[finding])
