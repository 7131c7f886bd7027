"""The checks of the fault suite, on made-up evidence: of what they would not find, nothing could be
said. Under 1 s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.faults import checks, parts, waiting
from tests.faults.checks import CHECKS, strange_errors
from tests.faults.evidence import Evidence, Row
from tests.faults.world import LEASE

RUN = "01a21428-5815-79ed-bb87-68735d28afe0"
AT = datetime(2026, 11, 25, 19, 22, 21, tzinfo=UTC)
SLOT = "2026-11-25T19:22:21+00:00"
ELSEWHERE = (*waiting.CHECKS, *parts.CHECKS)
"""Checks that have tests of their own."""


def told(event: str, at: float, fence: int = 1, **more: Any) -> Row:
    return {
        "event": event,
        "run": RUN,
        "task": "lock",
        "slot": SLOT,
        "fence": fence,
        "pid": 7,
        "at": at,
        **more,
    }


def run(**changes: Any) -> Row:
    made = {
        "id": RUN,
        "task": "lock",
        "slot": SLOT,
        "origin": "schedule",
        "state": "succeeded",
        "reason": None,
    }
    made |= {"parent": None, "awaited_by": None, "gate": None}
    return {
        **made,
        "attempt": 1,
        "attempts_before": 0,
        "fence": 2,
        "result": 1,
        "finished_at": 9.0,
        **changes,
    }


def attempt(fence: int, outcome: str) -> Row:
    return {
        "run": RUN,
        "fence": fence,
        "number": 1,
        "outcome": outcome,
        "pid": 7,
        "started_at": AT,
        "ended_at": AT + timedelta(seconds=3),
    }


def row(number: int, fence: int, part: int = 1) -> Row:
    return {"number": number, "run": RUN, "task": "lock", "fence": fence, "part": part}


def sound() -> Evidence:
    """A run that was lost once: its first attempt had committed, and its second one began when that
    was over.
    """
    lines = [
        told("start", 1.0),
        told("committing", 1.5, part=1),
        told("committing", 2.0, part=2),
        told("start", 4.0, fence=2, pid=8),
        told("seen", 4.1, fence=2, pid=8, numbers=[1]),
        told("committing", 5.0, fence=2, pid=8, part=1),
        told("end", 5.1, fence=2, pid=8),
    ]
    return Evidence(
        runs=[run()],
        attempts=[attempt(1, "lost"), attempt(2, "succeeded")],
        rows=[row(1, 1), row(3, 2)],
        told=lines,
        finals={RUN: [["succeeded", 2, "9"]]},
        reopened=Counter(),
        frozen=[],
        disturbed=[(7, 1.9, 9.9)],
    )


def found(evidence: Evidence) -> dict[str, list[str]]:
    all_found = {
        check.__name__: list(check(evidence)) for check in CHECKS if check not in ELSEWHERE
    }
    return {name: sentences for name, sentences in all_found.items() if sentences}


def test_nothing_is_wrong_with_a_run_that_was_lost_and_resumed() -> None:
    assert found(sound()) == {}


Break = Callable[[Evidence], Any]


def _retry_at_once(evidence: Evidence) -> None:
    evidence.attempts[0].update(outcome="failed")
    evidence.told.insert(3, told("end", 3.8))
    evidence.workers.update({7, 8})
    for each in (*evidence.runs, *evidence.told):
        each.update(task="flaky")


BREAKS: list[tuple[str, Break]] = [
    (
        "two_runs_of_a_slot",
        lambda e: e.runs.append(run(id="other", fence=0, state="queued", reason="x")),
    ),
    ("two_runs_of_a_slot", lambda e: e.told.append({**told("start", 9.0), "run": "other"})),
    ("attempts_without_an_end", lambda e: e.attempts.pop(0)),
    ("attempts_without_an_end", lambda e: e.attempts.pop()),
    ("attempts_without_an_end", lambda e: e.attempts[1].update(outcome="interrupted")),
    ("attempts_without_an_end", lambda e: e.told.append(told("start", 9.0, fence=3))),
    ("starts_under_one_fence", lambda e: e.told.append(told("start", 0.5))),
    ("runs_without_a_reason", lambda e: e.runs[0].update(state="failed", reason="")),
    ("attempts_used_up", lambda e: e.runs[0].update(attempt=2)),
    ("begun_again", lambda e: [line.update(task="once") for line in e.told]),
    ("changes_of_final_states", lambda e: e.finals[RUN].append(["succeeded", 2, "10"])),
    ("late_commits", lambda e: e.rows.insert(1, row(2, 1, part=2))),
    ("late_commits", lambda e: e.rows.append(row(4, 1, part=2))),
    ("late_commits", lambda e: e.rows.append(row(4, 2))),
    ("late_commits", lambda e: e.told[1].update(at=4.01)),
    ("commits_that_are_missing", lambda e: e.rows.pop()),
    ("losses_without_a_cause", lambda e: e.disturbed.clear()),
    ("losses_without_a_cause", lambda e: e.disturbed.insert(0, (e.disturbed.pop()[0], 4.1, 9.9))),
    (
        "claimed_and_forgotten",
        lambda e: (e.told.pop(0), e.attempts[0].update(ended_at=AT + timedelta(minutes=1))),
    ),
    ("retries_too_early", _retry_at_once),
    ("in_the_wrong_pool", lambda e: e.workers.add(8)),
    ("in_the_wrong_pool", lambda e: [line.update(task="slow") for line in e.told]),
    ("hardly_anything", lambda e: e.runs.clear()),
    (
        "bodies_beyond_the_lease",
        lambda e: e.told.insert(3, told("end", 4.1 + checks.SLACK_SECONDS)),
    ),
]


@pytest.mark.parametrize(("check", "broken"), BREAKS)
def test_what_does_not_hold_is_found(check: str, broken: Break) -> None:
    evidence = sound()
    broken(evidence)
    assert check in found(evidence)


def test_a_check_without_a_break_would_prove_nothing() -> None:
    assert {check.__name__ for check in CHECKS if check not in ELSEWHERE} == {
        name for name, _ in BREAKS
    }


def test_who_was_frozen_can_not_have_ended_in_time() -> None:
    evidence = sound()
    evidence.told.insert(3, told("end", 9.0))
    evidence.frozen.append((7, 2.5, 8.9))
    assert found(evidence) == {}
    evidence.frozen = [(8, 2.5, 8.9), (7, 0.0, 0.9), (7, 4.0 + 2 * LEASE, 99.0)]
    assert list(found(evidence)) == ["bodies_beyond_the_lease"]


def test_what_a_person_asked_for_may_happen_again() -> None:
    evidence = sound()
    evidence.reopened[RUN] = 1
    evidence.runs[0]["attempt"] = 2
    evidence.finals[RUN].insert(0, ["failed", 1, "3"])
    assert found(evidence) == {}


def test_a_traceback_is_strange_unless_it_is_a_tasks_own() -> None:
    trace = "Traceback (most recent call last):\n  File ...\nValueError: x\n"
    of_a_task = (
        f"2026-11-25T19:13:08.037Z [error    ] t failed [batch_system.batch] run=1 task=t\n{trace}"
    )
    assert list(strange_errors(of_a_task)) == []
    line = "2026-11-25T19:13:08.037Z [error    ] firing failed [batch_system.batch]"
    ours = f"{of_a_task}{line}\n{trace}"
    (found,) = strange_errors(ours)
    assert "firing failed" in found and "ValueError" in found
    assert list(strange_errors(trace))


def test_what_was_claimed_by_somebody_who_ended_waits_for_others() -> None:
    evidence = sound()
    evidence.told.pop(0)
    evidence.attempts[0].update(ended_at=AT + timedelta(minutes=1))
    assert list(found(evidence)) == ["claimed_and_forgotten"]
    evidence.stopped.append((7, AT.timestamp() + 1, AT.timestamp() + 99))
    assert found(evidence) == {}
