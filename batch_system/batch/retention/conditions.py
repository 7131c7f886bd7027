"""Conditions and statements that select the rows that are old enough to be deleted."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Row,
    Select,
    Update,
    and_,
    case,
    func,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.buckets import KEPT, buckets
from batch_system.batch.ledger.incidents.tables import incidents, outbox
from batch_system.batch.ledger.maintenance import maintenance
from batch_system.batch.ledger.merges import KEPT as KEPT_MERGES
from batch_system.batch.ledger.merges import merged, merges
from batch_system.batch.ledger.parts import HAS_NO_ACTIVE
from batch_system.batch.ledger.people.access import LINK
from batch_system.batch.ledger.people.access_tables import events, previews, sessions, tokens
from batch_system.batch.ledger.runs import locked_by_id
from batch_system.batch.ledger.states import ACTIVE, FINAL
from batch_system.batch.ledger.tables import (
    HELD_SQL,
    NO_PART_SQL,
    OF_SLOT_SQL,
    is_one_of,
    missed,
    nodes,
    runs,
    tasks,
)
from batch_system.database import sql

NODE_AGE = timedelta(days=1)

KEEP_MESSAGES = timedelta(days=32)
"""How long a record of a sent message is kept."""


def delete_over(kind: str) -> TextualSelect:
    """A statement that deletes the runs in :rows that ended before :before, and returns them."""
    named = f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)})"
    # Without `|| ''`, SQLite would use the index on state and read every final run, for each batch.
    is_over = (
        f"state || '' IN ({', '.join(repr(str(state)) for state in FINAL)}) AND finished_at < "
        ":before"
    )
    # The members of a group are kept as long as their follow-up, and a run as long as one of its
    # parts is active.
    follow_up = "SELECT f.id FROM batch_runs f WHERE f.id = batch_runs.awaited_by"
    may_go = f"(awaited_by IS NULL OR ({follow_up}) IS NULL)"
    # A slot is kept as long as a run waits for it; otherwise that run would be skipped.
    waiting = (
        "SELECT w.run FROM batch_waits w JOIN batch_runs a ON a.id = w.run "
        "WHERE w.task = batch_runs.task "
        f"AND w.slot = batch_runs.slot AND {is_one_of(ACTIVE, 'a.state')}"
    )
    may_go += f" AND NOT (batch_runs.{OF_SLOT_SQL} AND EXISTS ({waiting}))"
    condition = locked_by_id(f"{named} AND {is_over} AND {may_go} AND {HAS_NO_ACTIVE}", kind)
    statement = f"DELETE FROM batch_runs WHERE {condition} RETURNING id, slot, origin"
    typed = sql.statement(statement, before=runs.c.finished_at)
    return typed.columns(runs.c.id, runs.c.slot, runs.c.origin)


def is_gone(now: datetime) -> ColumnElement[bool]:
    """Nodes that stopped long ago, except those that still hold a run, because a rescue finds a run
    by its node.
    """
    held = select(runs.c.id).where(runs.c.node == nodes.c.id, text(HELD_SQL))
    return and_(nodes.c.stopped_at < now - NODE_AGE, ~held.exists())


def is_over(before: datetime) -> ColumnElement[bool]:
    """Runs in a final state that ended before `before`."""
    return and_(runs.c.state.in_(FINAL), runs.c.finished_at < before)


def is_old(task: str, kept: Row[Any], before: datetime) -> ColumnElement[bool]:
    """Runs of `task` that ended before `before` and are older than `kept`, the oldest run that is
    kept at any age.

    Parts are left out: they are deleted with their run.
    """
    at, run = kept.created_at, kept.id
    is_older = and_(
        runs.c.created_at <= min(at, before), or_(runs.c.created_at < at, runs.c.id < run)
    )
    return and_(runs.c.task == task, is_older, is_over(before), text(NO_PART_SQL))


def is_after(at: datetime, run: str) -> ColumnElement[bool]:
    """Runs after the one created at `at` with the id `run`, in the order of creation."""
    return and_(runs.c.created_at >= at, or_(runs.c.created_at > at, runs.c.id > run))


def accounts_begin_later(before: datetime) -> Update:
    """Let the account of each task begin at `before`, or earlier at the task's oldest slot with a
    run.
    """
    its_slots = (runs.c.task == tasks.c.name, text(OF_SLOT_SQL))
    oldest = select(func.min(runs.c.slot)).where(*its_slots).scalar_subquery()
    limit = literal(before, tasks.c.accounted_from.type)
    begin = case((oldest < limit, oldest), else_=limit)
    return update(tasks).where(tasks.c.accounted_from < begin).values(accounted_from=begin)


def is_before_the_account(at: Column[Any]) -> ColumnElement[bool]:
    """Rows whose instant `at` lies before the beginning of their task's account.

    A task's newest missed range is left out, because firing may be about to extend it.
    """
    begin = select(tasks.c.accounted_from).where(tasks.c.name == at.table.c.task).scalar_subquery()
    if at.table is not missed:
        return at < begin
    other = missed.alias()
    newer = select(other.c.id).where(
        other.c.task == missed.c.task, other.c.last_slot > missed.c.last_slot
    )
    return and_(at < begin, newer.exists())


def has_old_requests(now: datetime, before: datetime) -> Select[Any]:
    """Whether there are expired sessions, links or previews, or events and incidents that are older
    than `before`.
    """
    old = (
        select(sessions.c.id).where(sessions.c.expires_at < now),
        select(tokens.c.id).where(tokens.c.kind == LINK, tokens.c.expires_at < now),
        select(previews.c.id).where(previews.c.expires_at < now),
        select(merges.c.run).where(merges.c.until < now - KEPT_MERGES),
        select(merged.c.id).where(merged.c.at < before),
        select(events.c.id).where(events.c.at < before),
        select(incidents.c.id).where(incidents.c.closed_at < before),
        select(outbox.c.id).where(outbox.c.created_at < now - KEEP_MESSAGES),
        select(buckets.c.bucket).where(buckets.c.bucket < now - KEPT),
        select(maintenance.c.id).where(maintenance.c.ended_at < before),
    )
    return select(or_(*(query.exists() for query in old)))
