"""`batch account`."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service import clock
from service.cli.opening import ask
from service.cli.options import AsJson, OfTask, instant_or_age
from service.errors import InvalidParameters
from service.escaping import LONGEST_QUOTE, cut, echoed, line, to_json

if TYPE_CHECKING:
    from service.operations.account import Accounts, SlotFinding, SlotOutcome, TaskAccount


def account(
    since: Annotated[str, typer.Option(help="Slots since: ISO 8601, or an age such as 2h or 7d.")] = "24h",
    until: Annotated[str | None, typer.Option(help="Slots until: the same; default: now.")] = None,
    task: OfTask = None,
    slots: Annotated[bool, typer.Option("--slots", help="List every slot with what became of it.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compute every slot anew from the schedules of the past, and look up what became of it.

    Each has to be a run, a skip, or in a missed range. Exit code 1 when one is not.
    """
    from service import console

    begin, end = _interval(since, until)
    listed = _Slots(as_json)
    see = listed.see if slots else None
    accounts = ask(lambda operations: operations.slots.account(begin, end, task, see), log_level="WARNING")
    if as_json and slots:
        listed.end()
    elif as_json:
        console.show_json([of.model_dump() for of in accounts.tasks])
    else:
        _show(accounts, begin, end or clock.now())
    raise SystemExit(0 if accounts.complete else 1)


def _interval(since: str, until: str | None) -> tuple[datetime, datetime | None]:
    begin = instant_or_age(since, "--since")
    end = instant_or_age(until, "--until") if until is not None else None
    if begin >= (end or clock.now()):
        what = f"--until {cut(until, LONGEST_QUOTE)}" if until else "now"
        raise InvalidParameters(f"--since is {echoed(since)}; allowed: an instant before {what}")
    return begin, end


class _Slots:
    """Prints slots one by one, because there may be millions."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._before = "["

    def see(self, slot: SlotOutcome) -> None:
        if self._as_json:
            row = {**slot.model_dump(), "slot": slot.slot.isoformat()}
            _print(f"{self._before}{to_json(row)}", end="")
            self._before = ",\n "
        else:
            _print(line(f"{slot.task}  {_shown(slot.slot)}  {_outcome(slot)}"))

    def end(self) -> None:
        _print("]" if self._before != "[" else "[]")


def _print(made: str, end: str = "\n") -> None:
    """Here already, and not in main(): on its way there it would be taken for an error of the ledger, which is open."""
    from service import console

    try:
        console.write(made, end)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _outcome(slot: SlotOutcome) -> str:
    if slot.text:
        return f"{slot.kind.upper()}: {slot.text}" + (f" (run {slot.run})" if slot.run else "")
    what = f"run {slot.run} {slot.state}" if slot.run else slot.kind
    return what + (f": {slot.reason}" if slot.reason else "")


def _show(accounts: Accounts, since: datetime, until: datetime) -> None:
    from service import console

    rows = [_row(of, since) for of in accounts.tasks]
    console.show(rows, list(rows[0]) if rows else ["task", "slots"], as_json=False)
    for of in accounts.tasks:
        for finding in of.findings:
            console.say(f"{finding.kind.upper()} {of.task} {_sentence(finding)}")
    console.say(_conclusion(accounts, since, min(until, clock.now())))


def _row(of: TaskAccount, since: datetime) -> dict[str, Any]:
    """The cells of a task. Numbers are text, because a table leaves out columns that have no value, such as 0."""
    numbers = {name: str(getattr(of, name)) for name in ("slots", "runs", "skipped", "missed", "due", "gaps")}
    return {"task": of.task, "since": of.since if of.since > since else None, **numbers}


def _sentence(finding: SlotFinding) -> str:
    when = _shown(finding.first) + (f" to {_shown(finding.last)}" if finding.last != finding.first else "")
    number = f"{finding.count} slots: " if finding.count > 1 else ""
    return f"{when}: {number}{finding.text}"


def _conclusion(accounts: Accounts, since: datetime, until: datetime) -> str:
    between = f"between {_shown(since)} and {_shown(until)}"
    wrong = [
        _count(accounts.unaccounted, "slot is not accounted for", "slots are not accounted for"),
        _count(accounts.wrong_ranges, "missed range has a wrong count", "missed ranges have a wrong count"),
        _count(accounts.unreadable, "schedule can't be read", "schedules can't be read"),
    ]
    if not accounts.tasks:
        return f"no task had a schedule {between}"
    if any(wrong):
        return "; ".join(filter(None, wrong))
    due = _count(accounts.due, "is due and not handled yet", "are due and not handled yet")
    tasks = _count(len(accounts.tasks), "task", "tasks")
    return f"every slot of {tasks} {between} is accounted for" + (f"; {due}" if due else "")


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}" if number else ""


def _shown(at: datetime) -> str:
    return at.isoformat(" ", "seconds").replace("+00:00", "Z")
