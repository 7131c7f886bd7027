"""`batch account`."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from typing import Annotated, Any

import typer

from service import clock
from service.batch.account.account import Account, AccountedSlot, AccountFinding, Kind
from service.cli.options import AsJson, OfTask, instant_or_age, wait_for
from service.errors import InvalidParameters
from service.escaping import LONGEST_QUOTE, cut, echoed, line, to_json

TEXTS = {
    Kind.DUE: "not handled yet; a service does so when it next fires, or starts",
    Kind.LATE: "not handled for more than a minute, though a running service has the task",
    Kind.GAP: "no run, no skip, no missed range",
    Kind.SURPLUS: "a scheduled run, but no schedule has the slot",
    Kind.UNREADABLE: "the slots can't be computed",
}


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
    from service.batch.account.accounting import ignore
    from service.config import get_settings
    from service.operations import listing

    begin, end = _interval(since, until)
    listed = _Slots(as_json)
    found = wait_for(listing.accounts(get_settings(), begin, end, task, listed.see if slots else ignore))
    if as_json and slots:
        listed.end()
    elif as_json:
        console.show_json([_json(of) for of in found])
    else:
        _show(found, begin, end or clock.now())
    raise SystemExit(0 if all(of.is_complete for of in found) else 1)


def _interval(since: str, until: str | None) -> tuple[datetime, datetime | None]:
    begin = instant_or_age(since, "--since")
    end = instant_or_age(until, "--until") if until is not None else None
    if begin >= (end or clock.now()):
        what = f"--until {cut(until, LONGEST_QUOTE)}" if until else "now"
        raise InvalidParameters(f"--since is {echoed(since)}; allowed: an instant before {what}")
    return begin, end


class _Slots:
    """Prints one slot after the other: there may be millions."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._before = "["

    def see(self, entry: AccountedSlot) -> None:
        if self._as_json:
            row = {**entry._asdict(), "slot": entry.slot.isoformat()}
            _print(f"{self._before}{to_json(row)}", end="")
            self._before = ",\n "
        else:
            _print(line(f"{entry.task}  {_shown(entry.slot)}  {_outcome(entry)}"))

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


def _outcome(entry: AccountedSlot) -> str:
    if entry.kind in TEXTS:
        return f"{entry.kind.upper()}: {TEXTS[entry.kind]}" + (f" (run {entry.run})" if entry.run else "")
    what = f"run {entry.run} {entry.state}" if entry.run else entry.kind
    return what + (f": {entry.reason}" if entry.reason else "")


def _show(found: list[Account], since: datetime, until: datetime) -> None:
    from service import console

    rows = [_row(of, since) for of in found]
    console.show(rows, list(rows[0]) if rows else ["task", "slots"], as_json=False)
    for of in found:
        for finding in of.findings:
            console.say(f"{finding.kind.upper()} {of.task} {_sentence(finding)}")
    console.say(_conclusion(found, since, min(until, clock.now())))


def _row(of: Account, since: datetime) -> dict[str, Any]:
    """A table leaves out columns without a value; a zero is one."""
    numbers = {name: str(number) for name, number in _numbers(of).items()}
    return {"task": of.task, "since": of.since if of.since > since else None, **numbers}


def _numbers(of: Account) -> dict[str, int]:
    return {
        "slots": of.slots,
        "runs": of.counts[Kind.RUN],
        "skipped": of.counts[Kind.SKIPPED],
        "missed": of.counts[Kind.MISSED],
        "due": of.counts[Kind.DUE] + of.counts[Kind.LATE],
        "gaps": of.counts[Kind.GAP],
    }


def _json(of: Account) -> dict[str, Any]:
    return {
        "task": of.task,
        "since": of.since.isoformat(),
        "until": of.until.isoformat(),
        **_numbers(of),
        "complete": of.is_complete,
        "findings": [
            {
                "kind": finding.kind,
                "first": finding.first.isoformat(),
                "last": finding.last.isoformat(),
                "count": finding.count,
                "text": _text(finding),
            }
            for finding in of.findings
        ],
    }


def _sentence(finding: AccountFinding) -> str:
    when = _shown(finding.first) + (f" to {_shown(finding.last)}" if finding.last != finding.first else "")
    number = f"{finding.count} slots: " if finding.count > 1 else ""
    return f"{when}: {number}{_text(finding)}"


def _text(finding: AccountFinding) -> str:
    return ": ".join(filter(None, [TEXTS.get(finding.kind), finding.text]))


def _conclusion(found: list[Account], since: datetime, until: datetime) -> str:
    between = f"between {_shown(since)} and {_shown(until)}"
    total = {kind: sum(of.counts[kind] for of in found) for kind in Kind}
    wrong = [
        _count(total[Kind.GAP] + total[Kind.LATE], "slot is not accounted for", "slots are not accounted for"),
        _count(total[Kind.RANGE], "missed range has a wrong count", "missed ranges have a wrong count"),
        _count(total[Kind.UNREADABLE], "schedule can't be read", "schedules can't be read"),
    ]
    if not found:
        return f"no task had a schedule {between}"
    if any(wrong):
        return "; ".join(filter(None, wrong))
    due = _count(total[Kind.DUE], "is due and not handled yet", "are due and not handled yet")
    return f"every slot of {_count(len(found), 'task', 'tasks')} {between} is accounted for" + (
        f"; {due}" if due else ""
    )


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}" if number else ""


def _shown(at: datetime) -> str:
    return at.isoformat(" ", "seconds").replace("+00:00", "Z")
