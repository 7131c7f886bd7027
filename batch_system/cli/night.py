"""`batch night` and `batch forecast`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batch_system.cli.asked import asks
from batch_system.cli.opening import FAILED, ask
from batch_system.cli.options import AsJson
from batch_system.operations.runs import blocking
from batch_system.words import short

if TYPE_CHECKING:
    from batch_system.operations.night.results import DidNotRun, Forecasts, LeftOut, Need, Night
    from batch_system.operations.runs.waiting import LateRun
    from batch_system.verbs.night import ShowForecast, ShowNight

NEEDS_A_PERSON = ("alarm", "bad")
SHOWN = 20
"""At most this many rows of each list are shown."""


@asks("asked", "batch_system.verbs.night:ShowNight")
def night(asked: ShowNight, as_json: AsJson = False) -> None:
    """Say what happened last night, and what needs a person.

    Each slot that was due is counted, by what became of it. The exit code is 1 if something needs a
    person, otherwise it is 0.
    """
    from batch_system import console

    answer = ask(lambda operations: operations(asked), needs_tasks=False)
    if as_json:
        console.show_json(answer)
    else:
        _show(answer)
    raise SystemExit(FAILED if answer.level in NEEDS_A_PERSON else 0)


@asks("asked", "batch_system.verbs.night:ShowForecast")
def forecast(asked: ShowForecast, as_json: AsJson = False) -> None:
    """Say which promised deadlines are in danger, and what decides it.

    They are those of the last night and of the next twelve hours. The exit code is 1 if a deadline
    that has not passed will be missed or is at risk, otherwise it is 0.
    """
    from batch_system import console
    from batch_system.escaping import line
    from batch_system.operations.night.sentence import in_danger

    answer = ask(lambda operations: operations(asked), needs_tasks=False)
    if as_json:
        console.show_json(answer)
    elif not answer.slots:
        console.say("no task has promised anything: none has a deadline")
    else:
        console.write(line(answer.sentence or "No promise is in danger."))
        for each in _lines_of(answer):
            console.write(line(each))
        if answer.more:
            console.say(f"and {answer.more:,} more")
    raise SystemExit(FAILED if in_danger(answer) else 0)


def _promises(answer: Forecasts) -> Iterator[dict[str, Any]]:
    from batch_system.batch.incidents.forecast_telling import WORDS

    for each in answer.slots:
        if each.state in ("late", "at_risk"):
            yield {
                "task": each.task,
                "promised": each.deadline,
                "forecast": WORDS[each.state],
                "about": each.ends_at,
                "retry by": each.retry_until,
                "why": each.why,
            }


def _lines_of(answer: Forecasts) -> Iterator[str]:
    from batch_system.batch.incidents.forecast_telling import WORDS

    for each in answer.slots:
        yield f"{WORDS[each.state]}: {each.text}{f'. {each.why}' if each.why else ''}"


def _show(answer: Night) -> None:
    from batch_system import console
    from batch_system.cli.maintenance import in_words
    from batch_system.escaping import line

    console.write(
        console.paint(
            line(answer.headline), "error" if answer.level in NEEDS_A_PERSON else "success"
        )
    )
    console.write(line(answer.sentence))
    if answer.beside.runs:
        runs = answer.beside
        states = {
            name: getattr(runs, name) for name in ("succeeded", "failed", "cancelled", "active")
        }
        shown = ", ".join(f"{number:,} {name}" for name, number in states.items() if number)
        console.write(f"Beside them {runs.runs:,} by hand or by code: {shown}.")
    for window in answer.maintenance:
        console.write(line(in_words(window)))
    for date in answer.left_out:
        console.write(line(_left_out(date)))
    if answer.accounted_from is not None:
        console.write(
            f"Accounted from {answer.accounted_from:%Y-%m-%d %H:%M} UTC: earlier slots are still "
            "being counted."
        )
    if answer.forecast is not None:
        _table("Will it be there in time?", [*_promises(answer.forecast)])
    _table("Needs a person", [_need(need) for need in answer.needs])
    _table("Late or slow now", [_late(run) for run in answer.late])
    _table("Did not run, and why", [_cause(each) for each in answer.did_not_run])
    _table(
        "Dealt with",
        [
            each.model_dump(include={"at", "task", "how", "by", "runs"})
            for each in answer.dealt_with
        ],
    )


def _left_out(each: LeftOut) -> str:
    name = f" ({each.name})" if each.name else ""
    more = f" and {each.number - len(each.tasks):,} more" if each.number > len(each.tasks) else ""
    return f"Left out on {each.date}{name}: {', '.join(each.tasks)}{more}."


def _table(heading: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from batch_system import console

    if not rows:
        return
    console.heading(heading)
    columns = [name for name in rows[0] if any(row[name] not in (None, "") for row in rows)]
    console.show_fitted(list(rows[:SHOWN]), columns, columns[2:])
    if len(rows) > SHOWN:
        console.say(f"and {len(rows) - SHOWN:,} more: --json has them")


def _need(need: Need) -> dict[str, Any]:
    from batch_system.words import kept_back_in_words

    return {
        "kind": need.kind,
        "task": need.task or need.subject,
        "runs": need.open + need.retrying,
        "since": need.failing_since,
        "error": need.error,
        "keeps back": kept_back_in_words(need.keeps_back),
        "owner": need.owner,
        "incident": short(need.incident) if need.incident else None,
    }


def _late(run: LateRun) -> dict[str, Any]:
    return {
        "task": run.task,
        "run": short(run.run),
        "slot": run.slot,
        "why": run.why,
        "seconds": round(run.elapsed),
        "waits for": blocking.brief(run.blocker) if run.blocker is not None else None,
        "about until": run.eta or run.next_attempt_at,
    }


def _cause(each: DidNotRun) -> dict[str, Any]:
    tasks = each.task or ", ".join(
        f"{name} {number}" for name, number in list(each.tasks.items())[:5]
    )
    return {
        "cause": each.cause,
        "slots": each.slots,
        "tasks": tasks,
        "by": each.by,
        "from": each.begin,
        "until": each.until,
        "reason": blocking.in_the_way(each.after) if each.after is not None else each.reason,
        "left by": each.left_by,
    }
