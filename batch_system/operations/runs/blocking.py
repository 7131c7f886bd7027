"""What a run waits for and what is in its way, in words for a terminal and for `why`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batch_system.words import short, utc

if TYPE_CHECKING:
    from batch_system.operations.runs.waiting import (
        Awaited,
        Blocker,
        Chain,
        InTheWay,
        Link,
        Step,
        Waiting,
    )


def brief(blocker: Blocker) -> str:
    """For a cell of a table: "import (failed) a1b2c3d4", or a word for the kind of the blocker and
    its run.
    """
    if blocker.kind != "slot":
        return " ".join(
            filter(None, (blocker.kind, blocker.by, blocker.run and short(blocker.run)))
        )
    state = blocker.state or blocker.reason or "not fired yet"
    run = f" {short(blocker.run)}" if blocker.run else ""
    cause = f", because of {in_the_way(blocker.cause)}" if blocker.cause is not None else ""
    return f"{blocker.task} ({state}){run}{cause}"


def in_the_way(it: InTheWay) -> str:
    """A slot of another task: its name, its state, and its run if it has one."""
    state = it.state or it.reason or "not fired yet"
    return f"{it.task} ({state})" + (f" {short(it.run)}" if it.run else "")


def sentence(it: Awaited) -> str:
    """One thing that a waiting run waits for."""
    if it.kind == "instant":
        return f"until {utc(it.at)}" if it.at is not None else "for an instant"
    if it.kind == "group":
        return f"for {it.active or 0:,} of the {it.members or 0:,} runs of its group"
    if it.kind == "parts":
        return f"for {it.active or 0:,} of its {it.members or 0:,} parts"
    slot = f", slot {utc(it.at)}" if it.at is not None else ""
    run = f"its run {it.run} is {it.state}" if it.run else "it was not fired yet"
    cause = f", because of {in_the_way(it.cause)}" if it.cause is not None else ""
    return f"for {it.task}{slot}: {run}{cause}"


def in_brief(it: Awaited) -> str:
    """One thing that a waiting run waits for, for a cell of a table: "extract (running)", or an
    instant.
    """
    if it.kind == "instant":
        return utc(it.at) if it.at is not None else "an instant"
    if it.kind == "group":
        return f"{it.active or 0:,} of {it.members or 0:,} runs"
    if it.kind == "parts":
        return f"{it.members or 0:,} parts, {it.ended:,} done"
    cause = f", because of {in_the_way(it.cause)}" if it.cause is not None else ""
    return f"{it.task} ({it.state or 'not fired yet'}){cause}"


def blocker_in_words(blocker: Blocker) -> str:
    """What holds a run in the queue, as a sentence without its end."""
    if blocker.kind == "paused":
        return f"the task is paused by {blocker.by}"
    if blocker.kind == "unserved":
        return "no service has loaded the task"
    if blocker.kind == "pool":
        return f"no node of its pool {blocker.pool} executes its runs"
    if blocker.kind == "run":
        return f"for run {blocker.run} of the same task"
    if blocker.kind == "limit":
        return f"{blocker.running} of {blocker.limit} of {blocker.key or 'its key'} are running"
    if blocker.kind == "rate" and blocker.per is not None:
        begun = f"{blocker.running} of {blocker.limit} of {blocker.key or 'its key'} have begun"
        next_at = f"; the next may begin at {utc(blocker.at)}" if blocker.at is not None else ""
        return f"{begun} within {blocker.per:,g} seconds{next_at}"
    longest = f"; the longest run is {blocker.run} of {blocker.task}" if blocker.run else ""
    return f"for room: all services are busy{longest}"


def sentences(waiting: Waiting) -> list[str]:
    """All that a run waits for; empty if nothing is known."""
    blocker = [blocker_in_words(waiting.blocker)] if waiting.blocker is not None else []
    return [*blocker, *(sentence(it) for it in waiting.awaits)]


def line_of(chain: Chain, task: str, state: str | None) -> str | None:
    """The chain as a line of names with states; None if nothing comes before or after."""
    if not chain.before and not chain.after:
        return None
    own = f"[{task} {state or 'no run'}]"
    return " -> ".join([*map(_step, chain.before), own, *map(_step, chain.after)])


def _step(step: Step) -> str:
    more = f" and {step.more:,} more" if step.more else ""
    return ", ".join(map(_link, step.links)) + more


def _link(link: Link) -> str:
    number = f"{link.count:,} x " if link.count > 1 else ""
    return f"{number}{link.task} {link.state or 'no run'}"
