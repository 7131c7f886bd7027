"""Opens and closes waiting runs: by what they wait for, it decides whether they may start now, or
never will.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import parts, transitions, waits
from batch_system.batch.ledger.parts import PartsGate, Tally
from batch_system.batch.ledger.states import ACTIVE, Origin, RunState
from batch_system.batch.ledger.waits import AwaitedSlot, Gate, Members, WaitingRun

MOST = 500
"""How many runs are opened or closed in one transaction, at most."""
PARTS = "parts"
"""The fingerprint of a run of which a part did not succeed, if no error says why."""
MOST_NAMED = 3
"""How many of the slots that were in the way are named in the reason of a closed run."""


@dataclass(frozen=True)
class Closed:
    """A run that has ended while it waited, and not with an attempt: it was skipped, or has failed
    by its parts.
    """

    id: str
    task: str
    slot: datetime | None
    origin: str
    state: RunState
    reason: str

    @classmethod
    def of(cls, run: WaitingRun, state: RunState, reason: str) -> Closed:
        return cls(run.id, run.task, run.slot, run.origin, state, reason)


@dataclass
class Decided:
    """Waiting runs that are locked, with what is to become of each. `closing`: the reason by the id
    of the run.
    `without_cause`: those of them that close although nothing has failed, so that nobody knows of
    it yet.

    Of runs that were split: `joining` go on, `failing` fail (see transitions.fail_split), those in
    `cancelling` are cancelled, which was asked while parts were running, and of those in `stopping`
    the other parts are cancelled. The last two have the reason by the id of the run.
    """

    locked: list[WaitingRun] = field(default_factory=list)
    opening: list[WaitingRun] = field(default_factory=list)
    closing: dict[str, str] = field(default_factory=dict)
    without_cause: set[str] = field(default_factory=set)
    joining: list[str] = field(default_factory=list)
    failing: list[dict[str, Any]] = field(default_factory=list)
    cancelling: dict[str, str] = field(default_factory=dict)
    stopping: dict[str, str] = field(default_factory=dict)

    @property
    def closed(self) -> list[Closed]:
        """The runs that are closed. They may be told once the transaction has committed."""
        ends = {run: (RunState.SKIPPED, reason) for run, reason in self.closing.items()}
        ends |= {run["id"]: (RunState.FAILED, run["reason"]) for run in self.failing}
        ends |= {run: (RunState.CANCELLED, reason) for run, reason in self.cancelling.items()}
        return [Closed.of(run, *ends[run.id]) for run in self.locked if run.id in ends]


async def decide(
    connection: AsyncConnection,
    now: datetime,
    only: str | None = None,
    tasks: Iterable[str] | None = None,
) -> Decided:
    """Lock up to MOST waiting runs that may be opened or closed at `now` (database time), and
    decide about each.

    What they wait for is read after they were locked: whoever makes something of that active again
    locks them first. `only`: the id of a run; no other one is looked at. `tasks`: those whose slots
    are looked at first.
    """
    ready = await waits.ready(connection, now, MOST, only, tasks)
    decided = Decided(ready)
    gated = [run.id for run in ready if run.gate is not None and not run.is_split]
    await _decide_split(connection, [run for run in ready if run.is_split], decided)
    members = await waits.members(connection, gated) if gated else {}
    slots = await waits.slots(connection, gated) if gated else {}
    for run in (run for run in ready if not run.is_split):
        reason = _still_waits_or_closes(run, members.get(run.id), slots.get(run.id, []), now)
        if reason is None:
            decided.opening.append(run)
        elif reason:
            decided.closing[run.id] = reason
            if _has_no_cause(run, slots.get(run.id, [])):
                decided.without_cause.add(run.id)
    return decided


async def apply(connection: AsyncConnection, decided: Decided, now: datetime) -> int:
    """Open and close runs as it was decided, and return how many.

    Left are the runs of slots that were fired on time: the overlap policy decides about them (see
    firing/waiting.py).
    """
    opening = [run.id for run in decided.opening if not run.is_on_time]
    await transitions.open_waiting(connection, opening, now)
    await transitions.close_waiting(
        connection, decided.closing, now, gate=True, without_cause=decided.without_cause
    )
    await transitions.join_parts(connection, decided.joining, now)
    await transitions.fail_split(connection, decided.failing, now)
    for run, reason in decided.cancelling.items():
        # Its row says who has asked for it.
        await transitions.cancel(connection, [run], reason, "", now)
    for run, reason in decided.stopping.items():
        ids = await parts.active_ids(connection, run)
        await transitions.cancel(connection, ids, reason, "fail_fast", now)
    split = (
        len(decided.joining)
        + len(decided.failing)
        + len(decided.cancelling)
        + len(decided.stopping)
    )
    return len(opening) + len(decided.closing) + split


async def _decide_split(
    connection: AsyncConnection, split: list[WaitingRun], decided: Decided
) -> None:
    """Decide about runs that wait for their parts. The order of their ids is that of locks."""
    tallies = await parts.tallies(connection, [run.id for run in split]) if split else {}
    for run in split:
        tally = tallies.get(run.id, Tally({}))
        if run.cancel_reason is not None:
            decided.cancelling |= {} if tally.active else {run.id: run.cancel_reason}
            continue
        if not tally.bad:
            if not tally.active:
                decided.joining.append(run.id)
            continue
        bad = await parts.not_succeeded(connection, run.id, parts.MOST_NAMED)
        if not tally.active:
            fingerprint = await parts.fingerprint(connection, bad[0].id) or PARTS
            decided.failing.append(
                {"id": run.id, "reason": _parts_failed(tally, bad), "fingerprint": fingerprint}
            )
        elif run.gate == PartsGate.FAIL_FAST:
            decided.stopping[run.id] = f"part {bad[0].part} did not succeed"


def _parts_failed(tally: Tally, bad: Sequence[Any]) -> str:
    """Why a run fails whose parts are over: how many of them did not succeed, with the numbers of
    the first ones.
    """
    failed = tally.states.get(RunState.FAILED, 0)
    cancelled = tally.bad - failed
    named = [str(part.part) for part in bad if (part.state == RunState.FAILED) == bool(failed)]
    more = (
        f" and {(failed or cancelled) - len(named):,} more"
        if (failed or cancelled) > len(named)
        else ""
    )
    what = "failed" if failed else "cancelled"
    also = f"; {cancelled:,} cancelled" if failed and cancelled else ""
    return (
        f"{failed or cancelled:,} of {tally.number:,} parts {what}: {', '.join(named)}{more}{also}"
    )


def _still_waits_or_closes(
    run: WaitingRun, members: Members | None, slots: list[AwaitedSlot], now: datetime
) -> str | None:
    """Why the run closes; "" if it goes on waiting; None if it opens."""
    pending = [slot for slot in slots if slot.is_pending]
    if pending or (members is not None and members.active):
        if run.wait_until is None or run.wait_until > now:
            return ""
        return _waited_too_long(pending, now - run.due_at)
    if run.gate != Gate.SUCCESS:
        return None
    if members is not None and members.bad:
        return f"{members.bad:,} of {members.number:,} did not succeed: run {members.first_bad}"
    in_the_way = [_in_the_way(slot) for slot in slots if slot.state != RunState.SUCCEEDED]
    return _listed(in_the_way) if in_the_way else None


def _has_no_cause(run: WaitingRun, slots: list[AwaitedSlot]) -> bool:
    """Whether nothing that a closed slot waited for has failed: it has waited too long, or for what
    there is not.
    """
    if run.origin == Origin.MANUAL or any(slot.state == RunState.FAILED for slot in slots):
        return False
    return any(slot.is_pending or not slot.is_known for slot in slots)


def _in_the_way(slot: AwaitedSlot) -> str:
    if slot.run is None:
        return slot.why_none or f"{slot.task} has no run"
    has = "failed" if slot.state == RunState.FAILED else f"was {slot.state}"
    return f"{slot.task} {has}: run {slot.run}"


def _waited_too_long(pending: list[AwaitedSlot], waited: timedelta) -> str:
    return _listed(f"{each.task} {_was_still(each)} after {_words(waited)}" for each in pending)


def _was_still(slot: AwaitedSlot) -> str:
    return f"was still {slot.state}" if slot.state in ACTIVE else "had not been fired"


def _words(duration: timedelta) -> str:
    """The duration in its largest whole unit, such as "2 h"."""
    seconds = round(duration.total_seconds())
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length or seconds == length:
            return f"{round(seconds / length)} {unit}"
    return f"{seconds} s"


def _listed(reasons: Iterable[str]) -> str:
    """The first reasons, and how many more there are."""
    named = list(reasons)
    more = f"; and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return "; ".join(named[:MOST_NAMED]) + more
