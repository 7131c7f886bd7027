"""What must hold of runs that have waited, when the services have come to rest."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.faults.evidence import Evidence, Row

MEMBERS = 4
"""So many members a group has from the beginning."""
LATER_SECONDS = 1.5
WAITED_TOO_LONG = re.compile(r"(was still \w+|had not been fired) after ")

Awaited = Mapping[str, Sequence[Row | None]]
"""By the id of a run the runs that it waited for; None: a slot without a run."""


def awaited(evidence: Evidence) -> Awaited:
    of_slot = {
        (run["task"], str(run["slot"])): run for run in evidence.runs if run["origin"] != "manual"
    }
    found: dict[str, list[Row | None]] = defaultdict(list)
    for row in evidence.waits:
        found[row["run"]].append(of_slot.get((row["task"], str(row["slot"]))))
    for run in evidence.runs:
        if run["awaited_by"] is not None and run["origin"] != "part":
            found[run["awaited_by"]].append(run)
    return found


def asked_again(evidence: Evidence, awaited: Awaited, run: str) -> int:
    """How often a person has asked for a run to go on, or for what it has waited for, or has made a
    run of that.
    """
    before = [each for each in awaited.get(run, ()) if each is not None]
    made = sum(each["origin"] == "backfill" for each in before)
    return int(
        evidence.asked(run)
        + made
        + sum(asked_again(evidence, awaited, each["id"]) for each in before)
    )


def opened_too_early(evidence: Evidence) -> Iterator[str]:
    """A run that has waited began when all that it waited for was over, and with success if it
    needs that.
    """
    known, starts, ends = awaited(evidence), evidence.starts(), _ends(evidence)
    for run in evidence.runs:
        if (
            run["id"] not in known
            or not starts.get(run["id"])
            or asked_again(evidence, known, run["id"])
        ):
            continue
        began = min(start["at"] for start in starts[run["id"]].values())
        for other in known[run["id"]]:
            if run["gate"] == "success" and (other is None or other["state"] != "succeeded"):
                yield (
                    f"run {run['id']} of {run['task']} has begun, and what it waited for is {other}"
                )
            if other is None:
                continue
            lines = [
                starts.get(other["id"], {}).get(other["fence"]),
                ends.get((other["id"], other["fence"])),
            ]
            if late := [line for line in lines if line is not None and line["at"] > began]:
                yield (
                    f"run {run['id']} of {run['task']} began beside run {other['id']}, which was "
                    f"not over: {late}"
                )


def _ends(evidence: Evidence) -> dict[tuple[str, int], Row]:
    """The ends of bodies whose outcomes were written after them, by run and fence."""
    written = {
        (a["run"], a["fence"]) for a in evidence.attempts if a["outcome"] in ("succeeded", "failed")
    }
    lines = {(line["run"], line["fence"]): line for line in evidence.of("end")}
    return {key: line for key, line in lines.items() if key in written}


def closed_wrongly(evidence: Evidence) -> Iterator[str]:
    """A run that is closed has waited too long, or something that it waited for has not
    succeeded.
    """
    known = awaited(evidence)
    for run in evidence.runs:
        if (
            run["state"] != "skipped"
            or run["gate"] is None
            or WAITED_TOO_LONG.search(run["reason"] or "")
        ):
            continue
        others = known.get(run["id"], [])
        if run["gate"] == "end" or all(
            other is not None and other["state"] == "succeeded" for other in others
        ):
            yield (
                f"run {run['id']} of {run['task']} is closed ({run['reason']}), and it waited for "
                f"{others}"
            )


def succeeded_twice(evidence: Evidence) -> Iterator[str]:
    known = awaited(evidence)
    times = Counter(
        attempt["run"] for attempt in evidence.attempts if attempt["outcome"] == "succeeded"
    )
    for run, number in times.items():
        if number > 1 + asked_again(evidence, known, run):
            yield f"run {run} has succeeded {number} times"


def half_a_group(evidence: Evidence) -> Iterator[str]:
    """A group has all members with which it was started, and its follow-up finds these and the ones
    that came late.
    """
    known = awaited(evidence)
    seen = {line["run"]: line["ids"] for line in evidence.of("members")}
    for run in (run for run in evidence.runs if run["task"] == "digest"):
        members = [each for each in known.get(run["id"], ()) if each is not None]
        first = [each for each in members if each["parent"] == run["parent"]]
        if len(first) != MEMBERS:
            yield (
                f"run {run['id']} follows {len(first)} members of {MEMBERS} that were started "
                "together"
            )
        ids = sorted(each["id"] for each in members)
        if not asked_again(evidence, known, run["id"]) and sorted(seen.get(run["id"], ids)) != ids:
            yield f"run {run['id']} has found the members {seen[run['id']]}, and they are {ids}"


def begun_before_its_instant(evidence: Evidence) -> Iterator[str]:
    starts = evidence.starts()
    asked: dict[str, float] = {}
    for line in evidence.of("asked"):
        asked[line["run"]] = min(line["at"], asked.get(line["run"], line["at"]))
    for run in evidence.runs if evidence.has_one_clock else []:
        if run["task"] != "later" or run["id"] not in starts or evidence.reopened[run["id"]]:
            continue
        waited = min(start["at"] for start in starts[run["id"]].values()) - asked[run["parent"]]
        if waited < LATER_SECONDS:
            yield f"run {run['id']} of later began {waited:.2f} s after it was asked for"


def nothing_was_opened(evidence: Evidence) -> Iterator[str]:
    for task in ("digest", "load", "later"):
        if not any(run["task"] == task and run["attempt"] for run in evidence.runs):
            yield f"no run of {task} has begun: of runs that wait this shows nothing"


CHECKS: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    opened_too_early,
    closed_wrongly,
    succeeded_twice,
    half_a_group,
    begun_before_its_instant,
    nothing_was_opened,
)
