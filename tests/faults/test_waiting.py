"""The checks of runs that wait, on made-up evidence: of what they would not find, nothing could be
said. Under 1 s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults import waiting
from tests.faults.checks import changes_of_final_states
from tests.faults.evidence import Evidence, Row

SLOT = "2026-11-25T19:22:20+00:00"
LETTERS = ("letter 0", "letter 1", "letter 2", "letter 3", "late")


def run(name: str, task: str, **changes: Any) -> Row:
    made = {
        "id": name,
        "task": task,
        "slot": None,
        "origin": "manual",
        "state": "succeeded",
        "reason": None,
    }
    return {
        **made,
        "attempt": 1,
        "attempts_before": 0,
        "fence": 1,
        "parent": None,
        "awaited_by": None,
        "gate": None,
        **changes,
    }


def told(event: str, name: str, at: float, **more: Any) -> Row:
    return {"event": event, "run": name, "fence": 1, "at": at, **more}


def bodies(name: str, since: float, until: float) -> list[Row]:
    return [told("start", name, since), told("end", name, until)]


def sound() -> Evidence:
    """A group with a late member and its follow-up, a slot that has waited for another one, and a
    later run.
    """
    news = run("news", "news", slot=SLOT, origin="schedule")
    letters = [run(name, "letter", parent="news", awaited_by="digest") for name in LETTERS[:-1]]
    late = run("late", "letter", parent="letter 1", awaited_by="digest")
    digest = run("digest", "digest", parent="news", gate="success")
    slots = [
        run(task, task, slot=SLOT, origin="schedule", gate=gate) for task, gate in SLOTS.items()
    ]
    lines = [
        *(told("start", "news", 1.0), told("asked", "news", 1.1), told("end", "news", 1.2)),
        *(line for name in LETTERS for line in bodies(name, 2.0, 3.0)),
        *(
            told("start", "digest", 4.0),
            told("members", "digest", 4.1, ids=list(LETTERS)),
            told("end", "digest", 4.2),
        ),
        *bodies("later", 2.6, 2.7),
        *bodies("many", 1.0, 2.0),
        *bodies("load", 2.1, 3.0),
    ]
    everything = [news, *letters, late, digest, run("later", "later", parent="news"), *slots]
    return Evidence(
        runs=everything,
        attempts=[{"run": each["id"], "fence": 1, "outcome": each["state"]} for each in everything],
        told=lines,
        finals={each["id"]: [["succeeded", 1, "9"]] for each in everything},
        waits=[{"run": "load", "task": "many", "slot": SLOT}],
    )


SLOTS = {"many": None, "load": "success"}


def of(evidence: Evidence, name: str) -> Row:
    return next(each for each in evidence.runs if each["id"] == name)


def close(evidence: Evidence, name: str, reason: str = "1 of 5 did not succeed") -> Any:
    of(evidence, name).update(state="skipped", reason=reason, attempt=0)
    evidence.told = [line for line in evidence.told if line["run"] != name]


def found(evidence: Evidence) -> list[str]:
    checks = (*waiting.CHECKS, changes_of_final_states)
    return [check.__name__ for check in checks if list(check(evidence))]


def test_nothing_is_wrong_with_runs_that_have_waited() -> None:
    assert found(sound()) == []


Break = Callable[[Evidence], Any]
BREAKS: list[tuple[str, Break]] = [
    ("opened_too_early", lambda e: e.told.append(told("start", "late", 4.05))),
    ("opened_too_early", lambda e: e.told.append(told("end", "many", 2.2))),
    ("opened_too_early", lambda e: of(e, "letter 2").update(state="failed")),
    ("opened_too_early", lambda e: of(e, "many").update(state="cancelled")),
    ("opened_too_early", lambda e: e.runs.remove(of(e, "many"))),
    ("closed_wrongly", lambda e: close(e, "digest")),
    ("closed_wrongly", lambda e: close(e, "load")),
    (
        "closed_wrongly",
        lambda e: (close(e, "digest"), of(e, "digest").update(gate="end"), e.runs.pop(1)),
    ),
    (
        "succeeded_twice",
        lambda e: e.attempts.append({"run": "digest", "fence": 2, "outcome": "succeeded"}),
    ),
    ("half_a_group", lambda e: e.runs.remove(of(e, "letter 3"))),
    ("half_a_group", lambda e: next(e.of("members"))["ids"].pop()),
    ("begun_before_its_instant", lambda e: e.told.append(told("start", "later", 2.5))),
    ("nothing_was_opened", lambda e: of(e, "load").update(attempt=0)),
    ("changes_of_final_states", lambda e: e.finals["load"].insert(0, ["skipped", 0, "8"])),
]


@pytest.mark.parametrize(("check", "broken"), BREAKS)
def test_what_does_not_hold_is_found(check: str, broken: Break) -> None:
    evidence = sound()
    broken(evidence)
    assert check in found(evidence)


def test_a_check_without_a_break_would_prove_nothing() -> None:
    assert {check.__name__ for check in waiting.CHECKS} <= {name for name, _ in BREAKS}


def test_what_is_closed_because_something_has_failed_or_after_too_long_is_closed_rightly() -> None:
    evidence = sound()
    of(evidence, "letter 0").update(state="failed")
    close(evidence, "digest")
    close(evidence, "load", "many was still running after 15 s")
    assert found(evidence) == ["nothing_was_opened"]


def test_a_run_that_waits_for_one_that_has_not_begun_hides_nothing_of_that() -> None:
    """They are looked at in any order."""
    evidence = sound()
    close(evidence, "load", "many was still running after 15 s")
    evidence.runs.insert(0, run("gather", "gather", slot=SLOT, origin="schedule", gate="end"))
    evidence.waits.append({"run": "gather", "task": "load", "slot": SLOT})
    evidence.told += bodies("gather", 5.0, 6.0)
    assert found(evidence) == ["nothing_was_opened"]


def test_what_a_person_has_retried_lets_what_waited_for_it_go_on_again() -> None:
    evidence = sound()
    evidence.reopened["many"] = 1
    evidence.finals["load"].insert(0, ["skipped", 0, "8"])
    evidence.told += [told("start", "many", 9.0), told("end", "many", 9.1)]
    assert found(evidence) == []


def test_a_slot_that_a_person_has_backfilled_lets_what_waited_for_it_go_on() -> None:
    evidence = sound()
    of(evidence, "many").update(origin="backfill")
    evidence.finals["load"].insert(0, ["skipped", 0, "8"])
    assert found(evidence) == []
