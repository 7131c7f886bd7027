"""What must hold of runs that were split, and of their parts, when the services have come to
rest.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator

from batch_system.batch.ledger.states import FINAL
from tests.faults.evidence import Evidence, Row

TASKS = ("sums", "pooled_sums")
PARTS, ITEMS = 4, 9
"""How many parts a run has, and how many items each of them, one after the other."""
PARTS_FAILED = re.compile(r"\d+ of \d+ parts (failed|cancelled): ")


def is_deleted(evidence: Evidence, run: str, known: Collection[str]) -> bool:
    """Whether it was a part, and is gone because a person wanted its run from the beginning.
    `known`: all runs.
    """
    return run not in known and evidence.reopened[evidence.parents.get(run, "")] > 0


def _by_parent(evidence: Evidence) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for run in evidence.runs:
        if run["origin"] == "part":
            found[run["awaited_by"]].append(run)
    return found


def parts_lost_or_doubled(evidence: Evidence) -> Iterator[str]:
    """A run has all its parts, or none."""
    known = {run["id"]: run for run in evidence.runs}
    for parent, parts in _by_parent(evidence).items():
        if (numbers := sorted(part["part"] for part in parts)) != list(range(1, PARTS + 1)):
            yield f"run {parent} has the parts {numbers}"
        if parent not in known:
            yield f"run {parent} is not there, and its parts are: {parts}"


def parts_left(evidence: Evidence) -> Iterator[str]:
    """When a run is over, all its parts are, and of one that has succeeded they have too."""
    by_parent = _by_parent(evidence)
    for run in evidence.runs:
        states = [part["state"] for part in by_parent.get(run["id"], ())]
        if run["state"] in FINAL and set(states) - set(FINAL):
            yield f"run {run['id']} of {run['task']} is {run['state']}, and its parts {states}"
        has_joined = (
            run["task"] in TASKS and run["origin"] != "part" and run["state"] == "succeeded"
        )
        if has_joined and states != ["succeeded"] * PARTS:
            yield f"run {run['id']} of {run['task']} has succeeded, and its parts are {states}"
        if (
            run["state"] == "failed"
            and PARTS_FAILED.search(run["reason"] or "")
            and set(states) == {"succeeded"}
        ):
            yield f"run {run['id']} of {run['task']}: {run['reason']}, and its parts have succeeded"


def items_not_processed_once(evidence: Evidence) -> Iterator[str]:
    """Each item of a part is a row: once if the part has succeeded, and never more often than it
    was begun anew.
    """
    rows = Counter((row["run"], row["part"]) for row in evidence.rows)
    for part in (run for run in evidence.runs if run["origin"] == "part"):
        items = range((part["part"] - 1) * ITEMS, part["part"] * ITEMS)
        written = {item: number for (run, item), number in rows.items() if run == part["id"]}
        if strange := written.keys() - set(items):
            yield (
                f"part {part['part']}, run {part['id']}, has written the items {sorted(strange)} "
                "of others"
            )
        if more := {
            item: n for item, n in written.items() if n > 1 + evidence.reopened[part["id"]]
        }:
            yield f"part {part['part']}, run {part['id']}, has written items more than once: {more}"
        if part["state"] == "succeeded" and (less := set(items) - written.keys()):
            yield (
                f"part {part['part']}, run {part['id']}, has succeeded without the items "
                f"{sorted(less)}"
            )


def joined_wrongly(evidence: Evidence) -> Iterator[str]:
    """A run is joined when all its parts have succeeded, and the sum is that of all items."""
    by_parent, ends = (
        _by_parent(evidence),
        {(line["run"], line["fence"]): line for line in evidence.of("end")},
    )
    for run in (run for run in evidence.runs if run["task"] in TASKS and run["origin"] != "part"):
        if run["state"] == "succeeded" and run["result"] != PARTS * ITEMS:
            yield (
                f"run {run['id']} of {run['task']} has the sum {run['result']}, and should have "
                f"{PARTS * ITEMS}"
            )
        parts = sorted((part["part"], part["id"]) for part in by_parent.get(run["id"], ()))
        for line in evidence.of("joined") if not evidence.reopened[run["id"]] else ():
            if line["run"] != run["id"]:
                continue
            if (found := [tuple(part) for part in line["parts"]]) != parts:
                yield (
                    f"run {run['id']} of {run['task']} has joined the parts {found}, and has "
                    f"{parts}"
                )
            of_parts = [
                ends[part["id"], part["fence"]]
                for part in by_parent[run["id"]]
                if _has_end(part, ends)
            ]
            if late := [end for end in of_parts if end["at"] > line["at"]]:
                yield (
                    f"run {run['id']} of {run['task']} has joined before its parts were over: "
                    f"{late}"
                )


def _has_end(part: Row, ends: dict[tuple[str, int], Row]) -> bool:
    return (part["id"], part["fence"]) in ends


def split_or_joined_twice(evidence: Evidence) -> Iterator[str]:
    times = Counter(
        (a["run"], a["outcome"])
        for a in evidence.attempts
        if a["outcome"] in ("split", "succeeded")
    )
    for run in (run for run in evidence.runs if run["task"] in TASKS and run["origin"] != "part"):
        for outcome in ("split", "succeeded"):
            if (number := times[run["id"], outcome]) > 1 + evidence.reopened[run["id"]]:
                yield f"run {run['id']} of {run['task']} has {number} attempts that have {outcome}"


def nothing_was_joined(evidence: Evidence) -> Iterator[str]:
    joined = {
        run["task"]
        for run in evidence.runs
        if run["state"] == "succeeded" and run["origin"] != "part"
    }
    yield from (
        f"no run of {task} was joined: of parts this shows nothing"
        for task in TASKS
        if task not in joined
    )


CHECKS: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    parts_lost_or_doubled,
    parts_left,
    items_not_processed_once,
    joined_wrongly,
    split_or_joined_twice,
    nothing_was_joined,
)
