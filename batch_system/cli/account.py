"""`batch account`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batch_system import clock
from batch_system.cli.opening import ask
from batch_system.cli.options import AsJson, OfTask, instant_or_age
from batch_system.errors import InvalidParameters
from batch_system.escaping import LONGEST_QUOTE, cut, echoed, line, to_json
from batch_system.words import dates_in_words

if TYPE_CHECKING:
    from batch_system.operations.slots.results import (
        Accounts,
        SlotFinding,
        SlotOutcome,
        TaskAccount,
    )
    from batch_system.verbs.following import Operations


def account(
    since: Annotated[
        str,
        typer.Option(
            help="The beginning of the interval, in ISO 8601, or an age such as 2h or 7d."
        ),
    ] = "24h",
    until: Annotated[
        str | None, typer.Option(help="The end of the interval, in the same form; default: now.")
    ] = None,
    task: OfTask = None,
    slots: Annotated[
        bool, typer.Option("--slots", help="List every slot, with its run or missed range.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that every slot of an interval has a run, was skipped, or was recorded as missed.

    A slot is an instant at which a task was due. The slots are computed again from the schedules
    that the tasks had at the time. The exit code is 1 if a slot is not accounted for.
    """
    from batch_system import console

    begin, end = _interval(since, until)
    listed = _SlotList(as_json)
    on_slot = listed.print_slot if slots else None
    accounts = ask(
        lambda operations: _accounts(operations, begin, end, task, on_slot),
        log_level="WARNING",
    )
    if as_json and slots:
        listed.end()
    elif as_json:
        console.show_json(list(accounts.tasks))
    else:
        _show(accounts, begin, end or clock.now())
    raise SystemExit(0 if accounts.complete else 1)


async def _accounts(
    operations: Operations,
    begin: datetime,
    end: datetime | None,
    task: str | None,
    on_slot: Callable[[SlotOutcome], None] | None,
) -> Accounts:
    from batch_system.operations.slots import account
    from batch_system.verbs.slots import AccountForSlots

    if on_slot is None:
        return await operations(AccountForSlots(since=begin, until=end, task=task))
    if not operations.is_here:
        raise InvalidParameters(
            "single slots are listed only beside the ledger: call it there, without --url"
        )
    return await account.accounts(operations.context, begin, end, task, on_slot)


def _interval(since: str, until: str | None) -> tuple[datetime, datetime | None]:
    begin = instant_or_age(since, "--since")
    end = instant_or_age(until, "--until") if until is not None else None
    if begin >= (end or clock.now()):
        limit = f"--until {cut(until, LONGEST_QUOTE)}" if until else "now"
        raise InvalidParameters(f"--since is {echoed(since)}; allowed: an instant before {limit}")
    return begin, end


class _SlotList:
    """Prints slots one by one, because there may be millions of them."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._separator = "["

    def print_slot(self, slot: SlotOutcome) -> None:
        if self._as_json:
            _print(f"{self._separator}{to_json(slot.model_dump(mode='json'))}", end="")
            self._separator = ",\n "
        else:
            _print(line(f"{slot.task}  {_shown(slot.slot)}  {_outcome(slot)}"))

    def end(self) -> None:
        _print("]" if self._separator != "[" else "[]")


def _print(text: str, end: str = "\n") -> None:
    """Print a text. If stdout is a closed pipe, exit.

    main() can't do this, because the open ledger would take the error for one of its own.
    """
    from batch_system import console

    try:
        console.write(text, end)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _outcome(slot: SlotOutcome) -> str:
    if slot.text:
        return f"{slot.kind.upper()}: {slot.text}" + (f" (run {slot.run})" if slot.run else "")
    outcome = f"run {slot.run} {slot.state}" if slot.run else slot.kind
    return outcome + (f": {slot.reason}" if slot.reason else "")


def _show(accounts: Accounts, since: datetime, until: datetime) -> None:
    from batch_system import console

    rows = [_row(task_account, since) for task_account in accounts.tasks]
    console.show(rows, list(rows[0]) if rows else ["task", "slots"], as_json=False)
    for task_account in accounts.tasks:
        for finding in task_account.findings:
            console.say(f"{finding.kind.upper()} {task_account.task} {_sentence(finding)}")
        if task_account.left_out:
            console.say(f"left out {task_account.task} {dates_in_words(task_account.left_out)}")
    for problem in accounts.pools:
        console.say(f"POOL {problem}")
    console.say(_conclusion(accounts, since, min(until, clock.now())))


def _row(account: TaskAccount, since: datetime) -> dict[str, Any]:
    """The cells of a task. Numbers are text, because a table leaves out a column whose values are
    all empty or 0.
    """
    numbers = {
        name: str(getattr(account, name))
        for name in ("slots", "runs", "skipped", "missed", "due", "gaps")
    }
    return {
        "task": account.task,
        "since": account.since if account.since > since else None,
        **numbers,
    }


def _sentence(finding: SlotFinding) -> str:
    when = _shown(finding.first) + (
        f" to {_shown(finding.last)}" if finding.last != finding.first else ""
    )
    number = f"{finding.count} slots: " if finding.count > 1 else ""
    return f"{when}: {number}{finding.text}"


def _conclusion(accounts: Accounts, since: datetime, until: datetime) -> str:
    between = f"between {_shown(since)} and {_shown(until)}"
    problems = [
        _count(accounts.unaccounted, "slot is not accounted for", "slots are not accounted for"),
        _count(
            accounts.wrong_ranges,
            "missed range has a wrong count",
            "missed ranges have a wrong count",
        ),
        _count(accounts.unreadable, "schedule can't be read", "schedules can't be read"),
    ]
    if not accounts.tasks:
        return f"no task had a schedule {between}"
    if any(problems):
        return "; ".join(filter(None, problems))
    due = _count(accounts.due, "is due and not handled yet", "are due and not handled yet")
    tasks = _count(len(accounts.tasks), "task", "tasks")
    return f"every slot of {tasks} {between} is accounted for" + (f"; {due}" if due else "")


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}" if number else ""


def _shown(at: datetime) -> str:
    return at.isoformat(" ", "seconds").replace("+00:00", "Z")
