"""What must hold after every step: the ledger is as the model says, and what is true of any ledger
is true of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Any

from batch_system.batch.ledger.states import TRANSITIONS, RunState
from tests.model.plain import ACTIVE, FINAL, GATES, JOINING, AnyReason, Blamed, Model, Run, Task
from tests.model.world import Row, Snapshot

ALWAYS = (
    "state",
    "attempt",
    "attempts_before",
    "losses",
    "count",
    "fence",
    "node",
    "origin",
    "slot",
    "catch_up",
    "created_at",
    "started_at",
    "key",
    "part",
)
WHILE_ACTIVE = ("due_at", "rank", "gate", "wait_until")
OF_INCIDENTS = {"noticed_at", "fingerprint", "acknowledged", "made_good_at", "made_good_by"}
"""What the watch and people write on runs that are over."""


def check(model: Model, before: Snapshot, now: Snapshot, by_a_person: bool) -> None:
    """`by_a_person`: somebody asked for runs that are over to go on."""
    name_runs(model, now)
    problems = [
        *_differences(model, now),
        *_wrong_slots(model, now),
        *_wrong_changes(before, now, by_a_person, model.resumed),
        *_wrong_attempts(before, now),
        *_too_many(model, now),
        *_wrong_nodes(model, now),
        *_wrong_groups(model, now),
        *_wrong_parts(model, before, now),
    ]
    assert not problems, "\n".join(["", *problems])


def name_runs(model: Model, now: Snapshot) -> None:
    """The service makes the ids; the model knows its runs by task and slot until then."""
    rows = now.runs.values()
    by_slot = {
        (row["task"], row["slot"]): row["id"]
        for row in rows
        if row["origin"] not in ("manual", "part")
    }
    parts = {(row["awaited_by"], row["part"]): row["id"] for row in rows if row["origin"] == "part"}
    for run in (run for run in model.runs if not run.id):
        if run.part is not None and run.awaited_by is not None:
            run.id = parts.get((run.awaited_by.id, run.part), "")
        else:
            run.id = by_slot.get((run.task.name, run.slot), "")


def _differences(model: Model, now: Snapshot) -> Iterator[str]:
    expected = {run.id: run for run in model.runs}
    for run in model.runs:
        if run.id not in now.runs:
            yield f"{run}: the ledger has no such run, the model says it is {run.state}"
    for row in now.runs.values():
        if row["id"] not in expected:
            yield (
                f"{row['task']} {row['slot']}: a run that the model knows nothing of, "
                f"{row['state']}"
            )
        else:
            yield from _of_one(expected[row["id"]], row)


def _of_one(run: Run, row: Row) -> Iterator[str]:
    is_active = run.state in ACTIVE
    for name in ALWAYS + WHILE_ACTIVE * is_active:
        if row[name] != getattr(run, name):
            yield (
                f"{run}: {name} is {row[name]!r} in the ledger, and should be "
                f"{getattr(run, name)!r}"
            )
    if not _fits(run.reason, row["reason"]):
        yield f"{run} ({run.state}): its reason is {row['reason']!r}, and should be {run.reason!r}"
    if is_active and not _fits(run.cancel, row["cancel_reason"]):
        yield (
            f"{run} ({run.state}): it is asked to end by {row['cancel_reason']!r}, not by "
            f"{run.cancel!r}"
        )
    if row["finished_at"] != (None if is_active else run.finished_at):
        yield (
            f"{run} ({run.state}): finished at {row['finished_at']}, and should be "
            f"{run.finished_at}"
        )
    if row["state"] in ("failed", "cancelled", "skipped") and not row["reason"]:
        yield f"{run}: it is {row['state']} without a reason"


def _fits(expected: str | Blamed | AnyReason | None, text: str | None) -> bool:
    return (
        expected.fits(text or "") if isinstance(expected, Blamed | AnyReason) else expected == text
    )


def missed_in(now: Snapshot, task: Task) -> tuple[Counter[datetime], list[str]]:
    """How often each slot stands in a missed range, and which ranges count wrong."""
    found: Counter[datetime] = Counter()
    problems = []
    for row in (row for row in now.missed if row["task"] == task.name):
        within = [slot for slot in task.slots(row["last_slot"]) if slot >= row["first_slot"]]
        found.update(within)
        if len(within) != row["count"] or not row["reason"]:
            problems.append(f"{task.name}: the missed range {row} has {len(within)} slots")
        wrong = {task.missed.get(slot) for slot in within} - {row["reason"]}
        if wrong:
            problems.append(f"{task.name}: the missed range {row} should say {wrong}")
    return found, problems


def _wrong_slots(model: Model, now: Snapshot) -> Iterator[str]:
    """Every slot that was handled has exactly one run, or one recorded reason why not, or is yet to
    come.
    """
    for task in model.tasks.values():
        missed, problems = missed_in(now, task)
        yield from problems
        made = Counter(row["slot"] for row in now.runs.values() if _is_slots(row, task, "schedule"))
        filled = Counter(
            row["slot"] for row in now.runs.values() if _is_slots(row, task, "backfill")
        )
        due = [slot for slot in task.slots(task.handled) if slot >= task.accounted_from]
        for slot in due:
            if made[slot] + missed[slot] + filled[slot] - (missed[slot] and filled[slot]) != 1:
                numbers = (
                    f"{made[slot]} runs, {filled[slot]} by backfill, missed {missed[slot]} times"
                )
                yield f"{task.name} {slot}: {numbers}"
        yield from (
            f"{task.name} {slot}: nobody asked for it"
            for slot in made.keys() - set(task.slots(model.now))
        )


def _is_slots(row: Row, task: Task, origin: str) -> bool:
    return bool(row["task"] == task.name and row["origin"] == origin)


def _wrong_changes(
    before: Snapshot, now: Snapshot, by_a_person: bool, resumed: Collection[str]
) -> Iterator[str]:
    """Each change of a state is one of TRANSITIONS. Only a person leads out of a final state.

    `resumed`: the parts that have gone on because a person has retried their run.
    """
    for old_state, new_state in now.changes:
        if new_state not in TRANSITIONS[RunState(old_state)]:
            yield f"a run became {new_state} from {old_state}"
    for id_, old in before.runs.items():
        new = now.runs.get(id_)
        if new is None:
            if old["state"] not in FINAL:
                yield f"{old['task']} {old['slot']}: it was {old['state']} and is gone"
            continue
        is_asked = id_ in resumed or (by_a_person and new["state"] in ("queued", "waiting"))
        if old["state"] in FINAL and _changes(old, new) and not is_asked:
            yield f"{old['task']} {old['slot']}: it was over, and changed: {_changes(old, new)}"
        if new["fence"] < old["fence"]:
            yield (
                f"{old['task']} {old['slot']}: its fence fell from {old['fence']} to {new['fence']}"
            )
        if new["attempt"] < old["attempt"]:
            yield (
                f"{old['task']} {old['slot']}: its attempt fell from {old['attempt']} to "
                f"{new['attempt']}"
            )


def _changes(old: Row, new: Row) -> dict[str, Any]:
    return {
        name: (old[name], new[name]) for name in old.keys() - OF_INCIDENTS if old[name] != new[name]
    }


def _wrong_attempts(before: Snapshot, now: Snapshot) -> Iterator[str]:
    """Each fence of a run has one end, but for that of a running one, which is open."""
    ends: dict[str, list[Row]] = {id_: [] for id_ in now.runs}
    for row in now.attempts:
        ends.setdefault(row["run"], []).append(row)
    for id_, ended in ends.items():
        run = now.runs.get(id_)
        if run is None:
            yield f"attempts of run {id_}, which is not there"
            continue
        over = run["fence"] - (run["state"] == "running")
        if sorted(row["fence"] for row in ended) != list(range(1, over + 1)):
            yield (
                f"{run['task']} {run['slot']}: {run['state']} under {run['fence']}, with the ends "
                f"{ended}"
            )
    once = Counter(
        (r["run"], r["number"], r["outcome"])
        for r in now.attempts
        if r["outcome"] in ("succeeded", "split")
    )
    yield from (
        f"attempt {number} of run {run} has {how} {n} times"
        for (run, number, how), n in once.items()
        if n > 1
    )
    for row in before.attempts:
        if row["run"] in now.runs and row not in now.attempts:
            yield f"an attempt that had ended was changed: {row}"


def _too_many(model: Model, now: Snapshot) -> Iterator[str]:
    for task in model.tasks.values():
        lanes, policy = task.policy.lanes, task.policy
        of_task = [
            row for row in now.runs.values() if row["task"] == task.name and row["origin"] != "part"
        ]
        if policy.limit is not None:
            going = Counter(run.queue for run in task.runs if run.has_lane)
            yield from (
                f"{queue}: {number} run at once, of {policy.limit}"
                for queue, number in going.items()
                if number > policy.limit
            )
        if lanes is None:
            continue
        has_begun = [row for row in of_task if row["attempt"] > row["attempts_before"]]
        running = [
            row
            for row in has_begun
            if row["state"] in ("running", "queued") or _waits_for_parts(row)
        ]
        unasked = {run.id for run in task.runs if run.is_opened_unasked}
        on_time = [
            r
            for r in of_task
            if r["origin"] == "schedule" and not r["catch_up"] and r["id"] not in unasked
        ]
        on_time = [
            r
            for r in on_time
            if r["state"] in ACTIVE and (r["state"] != "waiting" or _waits_for_parts(r))
        ]
        if len(running) > lanes:
            yield f"{task.name}: {len(running)} run at once, of {lanes}"
        most = {"skip": lanes, "wait": lanes + policy.max_waiting, "replace": lanes}.get(
            policy.overlap
        )
        if policy.overlap == "replace":
            on_time = [row for row in on_time if not row["cancel_reason"]]
        if most is not None and len(on_time) > most:
            yield f"{task.name} ({policy.overlap}): {len(on_time)} slots are active, of {most}"


def _wrong_groups(model: Model, now: Snapshot) -> Iterator[str]:
    """A follow-up goes before its members do, and what waits has not begun."""
    for run in model.runs:
        follow_up = run.awaited_by.id if run.awaited_by is not None else None
        if run.id in now.runs and now.runs[run.id]["awaited_by"] != follow_up:
            yield (
                f"{run}: it is awaited by {now.runs[run.id]['awaited_by']}, and should be by "
                f"{follow_up}"
            )
    for row in now.runs.values():
        has_begun = row["attempt"] > row["attempts_before"] or row["started_at"] is not None
        if row["state"] == "waiting" and has_begun and not _waits_for_parts(row):
            yield f"{row['task']} {row['slot']}: it waits, and has begun"


def _waits_for_parts(row: Row) -> bool:
    return bool(row["state"] == "waiting" and row["gate"] in GATES)


def _wrong_parts(model: Model, before: Snapshot, now: Snapshot) -> Iterator[str]:
    """No part is lost, doubled or left behind, no more of them run than may, and all have succeeded
    before a join.
    """
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in now.runs.values():
        if row["origin"] == "part":
            parts[row["awaited_by"]].append(row)
    for task in (task for task in model.tasks.values() if task.policy.parts is not None):
        running = [
            row
            for own in parts.values()
            for row in own
            if (row["task"], row["state"]) == (task.name, "running")
        ]
        if len(running) > task.policy.parallel:
            yield f"{task.name}: {len(running)} parts run at once, of {task.policy.parallel}"
    for id_, own in parts.items():
        run = now.runs.get(id_)
        if run is None:
            yield f"{len(own)} parts of run {id_}, which is not there"
            continue
        numbers = sorted(row["part"] for row in own)
        if numbers != list(range(1, (model.tasks[run["task"]].policy.parts or 0) + 1)):
            yield f"{run['task']} {run['slot']}: it has the parts {numbers}"
        yield from _wrongly_over(run, [row["state"] for row in own], before.runs.get(id_))


def _wrongly_over(run: Row, states: list[str], before: Row | None) -> Iterator[str]:
    """`states`: of the parts of a run."""
    name = f"{run['task']} {run['slot']}, {run['state']} with its parts {states}"
    if run["gate"] not in GATES:
        yield f"{name}: it was not split"
    if run["state"] == "succeeded" and set(states) - {"succeeded"}:
        yield f"{name}: it has joined"
    if run["state"] in ("failed", "succeeded") and set(states) & set(ACTIVE):
        yield f"{name}: it is over"
    was_waiting = before is not None and _waits_for_parts(before)
    if (
        was_waiting
        and run["state"] == "queued"
        and run["rank"] == JOINING
        and set(states) - {"succeeded"}
    ):
        yield f"{name}: it goes on"


def _wrong_nodes(model: Model, now: Snapshot) -> Iterator[str]:
    expected = {id_: (node.beats, node.is_stopped) for id_, node in model.nodes.items()}
    found = {id_: (row["beats"], row["stopped_at"] is not None) for id_, row in now.nodes.items()}
    if found != expected:
        yield f"nodes: the ledger has {found}, the model {expected}"
    for name, task in model.tasks.items():
        if now.tasks[name]["removed_at"] != task.removed_at:
            yield (
                f"{name}: removed at {now.tasks[name]['removed_at']}, and should be at "
                f"{task.removed_at}"
            )
        if now.tasks[name]["paused_by"] != task.paused_by:
            yield (
                f"{name}: paused by {now.tasks[name]['paused_by']}, and should be by "
                f"{task.paused_by}"
            )


def wrong_entries(model: Model, task: Task, entries: dict[datetime, str]) -> Iterator[str]:
    """What the account says of each slot, beside what the model knows."""
    due = [slot for slot in task.slots(model.now) if slot >= task.accounted_from]
    for slot in due:
        run = task.of_slot(slot)
        expected = "missed" if slot in task.missed else "due"
        if run is not None:
            expected = "skipped" if run.state == "skipped" else "run"
        if entries.get(slot, "nothing").replace("late", "due") != expected:
            yield f"account of {task.name}: {slot} is {entries.get(slot)}, and should be {expected}"
    others = entries.keys() - set(due)
    yield from (
        f"account of {task.name}: {slot} is {entries[slot]}, and is no slot" for slot in others
    )
