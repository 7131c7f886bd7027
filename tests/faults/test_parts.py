"""The checks of runs that were split, on made-up evidence: of what they would not find, nothing
could be said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults import checks, parts
from tests.faults.evidence import Evidence, Row
from tests.faults.parts import ITEMS, PARTS

OTHERS = (
    checks.two_runs_of_a_slot,
    checks.attempts_without_an_end,
    checks.attempts_used_up,
    checks.changes_of_final_states,
    checks.commits_that_are_missing,
    checks.late_commits,
)
SLOT = "2026-11-25T19:22:20+00:00"


def run(name: str, task: str, **changes: Any) -> Row:
    made = {
        "id": name,
        "task": task,
        "slot": SLOT,
        "origin": "schedule",
        "state": "succeeded",
        "reason": None,
    }
    return {
        **made,
        "attempt": 1,
        "attempts_before": 0,
        "fence": 2,
        "awaited_by": None,
        "gate": "parts",
        "part": None,
        **changes,
    }


def told(event: str, name: str, at: float, fence: int = 1, **more: Any) -> Row:
    return {
        "event": event,
        "run": name,
        "task": name.split()[0],
        "slot": SLOT,
        "fence": fence,
        "at": at,
        **more,
    }


def attempt(name: str, fence: int, outcome: str) -> Row:
    return {"run": name, "fence": fence, "outcome": outcome}


def sound() -> Evidence:
    """A run whose second part was lost after its first three items, and one of the other task."""
    evidence = Evidence(runs=[run(task, task, result=PARTS * ITEMS) for task in parts.TASKS])
    for task in parts.TASKS:
        evidence.attempts += [attempt(task, 1, "split"), attempt(task, 2, "succeeded")]
        names = [f"{task} {number}" for number in range(1, PARTS + 1)]
        for number, name in enumerate(names, start=1):
            fences = [1, 2] if number == 2 else [1]
            more = {
                "part": number,
                "awaited_by": task,
                "origin": "part",
                "slot": None,
                "gate": None,
                "result": ITEMS,
            }
            evidence.runs.append(run(name, task, fence=fences[-1], **more))
            for fence in fences:
                evidence.attempts.append(
                    attempt(name, fence, "succeeded" if fence == fences[-1] else "lost")
                )
                evidence.told.append(told("start", name, 1.0 + fence, fence, of=task))
            evidence.told.append(told("end", name, 4.0, fences[-1]))
            for item in range((number - 1) * ITEMS, number * ITEMS):
                fence = fences[0] if item < (number - 1) * ITEMS + 3 else fences[-1]
                evidence.rows.append(
                    {
                        "number": len(evidence.rows),
                        "run": name,
                        "task": task,
                        "fence": fence,
                        "part": item,
                    }
                )
        joined = [[number, name] for number, name in enumerate(names, start=1)]
        evidence.told += [told("start", task, 1.0), told("start", task, 5.0, 2)]
        evidence.told.append(told("joined", task, 5.1, 2, parts=joined))
    evidence.finals = {each["id"]: [["succeeded", each["fence"], "9"]] for each in evidence.runs}
    return evidence


def of(evidence: Evidence, name: str) -> Row:
    return next(each for each in evidence.runs if each["id"] == name)


def found(evidence: Evidence) -> list[str]:
    return [check.__name__ for check in (*parts.CHECKS, *OTHERS) if list(check(evidence))]


def test_nothing_is_wrong_with_a_run_of_which_a_part_was_lost_and_resumed() -> None:
    assert found(sound()) == []


Break = Callable[[Evidence], Any]
BREAKS: list[tuple[str, Break]] = [
    ("parts_lost_or_doubled", lambda e: e.runs.remove(of(e, "sums 3"))),
    ("parts_lost_or_doubled", lambda e: e.runs.append({**of(e, "sums 3"), "id": "other"})),
    ("parts_lost_or_doubled", lambda e: e.runs.remove(of(e, "sums"))),
    ("parts_left", lambda e: of(e, "sums 3").update(state="running")),
    ("parts_left", lambda e: of(e, "sums 3").update(state="failed")),
    ("parts_left", lambda e: of(e, "sums").update(state="failed", reason="1 of 4 parts failed: 2")),
    ("items_not_processed_once", lambda e: e.rows.pop()),
    ("items_not_processed_once", lambda e: e.rows.append(dict(e.rows[-1]))),
    ("items_not_processed_once", lambda e: e.rows[-1].update(part=1)),
    ("joined_wrongly", lambda e: of(e, "sums").update(result=35)),
    ("joined_wrongly", lambda e: next(e.of("joined"))["parts"].pop()),
    ("joined_wrongly", lambda e: e.told.append(told("end", "sums 3", 6.0))),
    ("split_or_joined_twice", lambda e: e.attempts.append(attempt("sums", 3, "succeeded"))),
    ("split_or_joined_twice", lambda e: e.attempts.append(attempt("sums", 3, "split"))),
    ("nothing_was_joined", lambda e: of(e, "pooled_sums").update(state="cancelled")),
    ("changes_of_final_states", lambda e: e.finals["sums 3"].insert(0, ["failed", 1, "8"])),
    (
        "attempts_without_an_end",
        lambda e: of(e, "sums").update(state="failed", reason="ValueError: no"),
    ),
    ("attempts_used_up", lambda e: of(e, "sums 3").update(attempt=3)),
]


@pytest.mark.parametrize(("check", "broken"), BREAKS)
def test_what_does_not_hold_is_found(check: str, broken: Break) -> None:
    evidence = sound()
    broken(evidence)
    assert check in found(evidence)


def test_a_check_without_a_break_would_prove_nothing() -> None:
    assert {check.__name__ for check in parts.CHECKS} <= {name for name, _ in BREAKS}


def test_what_a_person_has_run_from_the_beginning_has_new_parts() -> None:
    evidence = sound()
    evidence.reopened["sums"] = 1
    evidence.told.append(told("start", "deleted", 1.0, of="sums"))
    evidence.finals["deleted"] = [["failed", 1, "2"], ["cancelled", 2, "3"]]
    evidence.finals["sums 3"].insert(0, ["failed", 1, "8"])
    assert found(evidence) == []


def test_a_run_whose_parts_have_failed_ended_by_its_split() -> None:
    evidence = sound()
    of(evidence, "sums").update(state="failed", reason="1 of 4 parts failed: 3", fence=1)
    of(evidence, "sums 3").update(state="failed", reason="ConnectionError: not yet")
    evidence.attempts = [
        {**each, "outcome": "failed"} if each["run"] == "sums 3" else each
        for each in evidence.attempts
        if (each["run"], each["fence"]) != ("sums", 2)
    ]
    evidence.told = [line for line in evidence.told if line["run"] != "sums" or line["fence"] == 1]
    assert found(evidence) == ["nothing_was_joined"]
