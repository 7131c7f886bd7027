"""What is old enough to be deleted, as conditions and statements."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Row,
    Update,
    and_,
    bindparam,
    case,
    func,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.sql.selectable import TextualSelect

from service.batch.ledger import json_rows
from service.batch.ledger.runs import locked_by_id
from service.batch.ledger.states import FINAL
from service.batch.ledger.tables import HELD_SQL, missed, nodes, runs, tasks

NODE_AGE = timedelta(days=1)


def delete_over(kind: str) -> TextualSelect:
    """Deletes those of the runs in :rows that have ended before :before, and returns them."""
    named = f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)})"
    # By the index on state SQLite would look at every run that is over, for each batch.
    is_over = f"state || '' IN ({', '.join(repr(str(state)) for state in FINAL)}) AND finished_at < :before"
    statement = (
        f"DELETE FROM batch_runs WHERE {locked_by_id(f'{named} AND {is_over}', kind)} RETURNING id, slot, origin"
    )
    typed = text(statement).bindparams(bindparam("before", type_=runs.c.finished_at.type))
    return typed.columns(runs.c.id, runs.c.slot, runs.c.origin)


def is_gone(now: datetime) -> ColumnElement[bool]:
    """Stopped for long. One that a run is still running on stays: it is how that run will be found and resumed."""
    held = select(runs.c.id).where(runs.c.node == nodes.c.id, text(HELD_SQL))
    return and_(nodes.c.stopped_at < now - NODE_AGE, ~held.exists())


def is_over(before: datetime) -> ColumnElement[bool]:
    return and_(runs.c.state.in_(FINAL), runs.c.finished_at < before)


def is_old(task: str, kept: Row[Any], before: datetime) -> ColumnElement[bool]:
    """Over for long, and older than the oldest of those that are kept in any case."""
    at, run = kept.created_at, kept.id
    is_older = and_(runs.c.created_at <= min(at, before), or_(runs.c.created_at < at, runs.c.id < run))
    return and_(runs.c.task == task, is_older, is_over(before))


def is_after(at: datetime, run: str) -> ColumnElement[bool]:
    return and_(runs.c.created_at >= at, or_(runs.c.created_at > at, runs.c.id > run))


def accounts_begin_later(before: datetime) -> Update:
    """Each at `before`, or at its oldest slot that still has a run."""
    has_slot = text("origin <> 'manual'")  # to the letter as in the index
    oldest = select(func.min(runs.c.slot)).where(runs.c.task == tasks.c.name, has_slot).scalar_subquery()
    limit = literal(before, tasks.c.accounted_from.type)
    begin = case((oldest < limit, oldest), else_=limit)
    return update(tasks).where(tasks.c.accounted_from < begin).values(accounted_from=begin)


def is_before_the_account(at: Column[Any]) -> ColumnElement[bool]:
    """Of its task. The newest missed range stays: firing may be about to make that one longer."""
    begin = select(tasks.c.accounted_from).where(tasks.c.name == at.table.c.task).scalar_subquery()
    if at.table is not missed:
        return at < begin
    other = missed.alias()
    newer = select(other.c.id).where(other.c.task == missed.c.task, other.c.last_slot > missed.c.last_slot)
    return and_(at < begin, newer.exists())
