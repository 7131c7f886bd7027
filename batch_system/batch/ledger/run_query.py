"""Lists of runs by any filters, in pages. The work for a page is bounded, whatever the filters are.

The conditions on task, state and time of making use an index. All others are checked on at most
LOOKED rows a page, in the order of the list, so a page may have fewer rows than were asked for, and
yet not be the last one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Subquery,
    Text,
    and_,
    case,
    cast,
    func,
    literal,
    select,
    text,
    true,
    tuple_,
    type_coerce,
    union_all,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.runs import LISTED
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, OF_SLOT_SQL, PART_SQL, runs

LOOKED = 10_000
"""At most this many rows are read for a page."""
COUNTED = LOOKED
"""Runs are counted up to this number."""
CHECKED = frozenset(
    (
        "task",
        "state",
        "origin",
        "node",
        "slot",
        "created_at",
        "finished_at",
        "params",
        "reason",
        "fingerprint",
    )
)
"""The columns that the other conditions need."""
PARTS = frozenset((Origin.PART,))

Columns = ReadOnlyColumnCollection[str, Any]
Key = tuple[datetime, str]
"""The place of a run in a list: the instant that the list is ordered by, and the run's id."""


@dataclass(frozen=True)
class RunQuery:
    """Which runs a list has. Instants are aware; `…_since` is included, `…_until` is not.

    Attributes:
        ids: Only these runs, which may be parts; empty for all.
        tasks: Only runs of these tasks; None stands for all.
        without: No runs of these tasks.
        params: JSON values that parameters have, by the name of the parameter.
        text: Only runs whose reason, which has the text of an error, contains this, whatever the
            case.
        fingerprint: Only runs with this error. An index finds those of one task.
        parent: Only the parts of this run. Without it, and unless `origins` has "part", there are
            no parts.
        by_slot: Order by the slot instead of the time of making. Manual runs and parts are left
            out.
    """

    ids: frozenset[str] = frozenset()
    task: str | None = None
    tasks: frozenset[str] | None = None
    without: frozenset[str] = frozenset()
    states: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    node: str | None = None
    created_since: datetime | None = None
    created_until: datetime | None = None
    slot_since: datetime | None = None
    slot_until: datetime | None = None
    ended_since: datetime | None = None
    ended_until: datetime | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    fingerprint: str | None = None
    parent: str | None = None
    by_slot: bool = False

    @property
    def reads_texts(self) -> bool:
        """Whether a condition is on parameters or errors, which may be hidden from the caller."""
        return bool(self.params) or self.text is not None or self.fingerprint is not None


class Page(NamedTuple):
    """A page of rows of runs. `after`: the key after which the next page begins; None at the end of
    the list.
    """

    rows: list[Mapping[Any, Any]]
    after: Key | None


async def page(
    connection: AsyncConnection,
    query: RunQuery,
    limit: int,
    before: Key | None = None,
    columns: Sequence[str] = LISTED,
    most: int = LOOKED,
) -> Page:
    """A page of at most `limit` runs, newest first. `before`: the key that the previous page ended
    with. `most`: so many rows are read at most for conditions that no index serves.
    """
    at = runs.c.slot if query.by_slot else runs.c.created_at
    kind = connection.dialect.name
    shown = {*columns, at.name, "id"}
    has_others = any(True for _ in _others(query, runs.c, kind))
    names, number = (shown | CHECKED, most) if has_others else (shown, limit + 1)
    looked = _looked(query, at, before, names, number)
    order = (looked.c[at.name].desc(), looked.c.id.desc())
    ordered = select(*(looked.c[name] for name in shown)).order_by(*order)
    matching = ordered.where(*_others(query, looked.c, kind)).limit(limit + 1)
    rows = [*(await connection.execute(matching)).mappings()]
    if len(rows) > limit:
        return Page(rows[:limit], (rows[limit - 1][at.name], rows[limit - 1]["id"]))
    if not has_others:
        return Page(rows, None)
    last = select(looked.c[at.name], looked.c.id).order_by(*order).offset(most - 1).limit(1)
    end = (await connection.execute(last)).first()
    return Page(rows, (end[0], end[1]) if end is not None else None)


class Number(NamedTuple):
    """How many runs are like this, among the `of` newest ones. `is_all`: there are no others."""

    number: int
    of: int
    is_all: bool


async def number(connection: AsyncConnection, query: RunQuery, most: int) -> Number:
    """Count the runs among the newest `most` that an index finds; of each state, if several are
    wanted.
    """
    kind = connection.dialect.name
    is_many = _is_by_state(query) and len(query.states) > 1
    each = [replace(query, states=frozenset((s,))) for s in query.states] if is_many else [query]
    others = [*_others(query, runs.c, kind)]
    names = {"id", "created_at"} | (CHECKED if others else set())
    numbers = []
    for one in each:
        looked = _looked(one, runs.c.created_at, None, names, most + 1)
        is_like_this = case((and_(true(), *_others(one, looked.c, kind)), 1), else_=0)
        like_this = func.coalesce(func.sum(is_like_this), 0)
        numbers.append(select(func.count(), like_this).select_from(looked))
    found = (await connection.execute(union_all(*numbers))).all()
    of = sum(min(row[0], most) for row in found)
    return Number(min(sum(row[1] for row in found), of), of, all(row[0] <= most for row in found))


class Counts(NamedTuple):
    """How many runs there are, and how many in each state. A number above COUNTED stands for more
    than COUNTED. `by_state` is None if there are too many runs to know it.
    """

    all: int
    by_state: Mapping[str, int] | None


async def counts(connection: AsyncConnection, query: RunQuery) -> Counts | None:
    """Count the runs, whatever their state; None where no index serves the other conditions.

    An index has runs in the order of their states, and others have those of a task and the parts
    of a run.
    """
    query = replace(query, states=frozenset())
    if _has_parts(query) or any(True for _ in _others(query, runs.c, connection.dialect.name)):
        return None
    is_small = query.task is not None or query.parent is not None or bool(query.ids)
    each = [query] if is_small else [replace(query, states=frozenset((s,))) for s in RunState]
    names = {"created_at", "id", "state"}
    found = [_looked(one, runs.c.created_at, None, names, COUNTED + 1) for one in each]
    numbers = union_all(*(select(one.c.state, func.count()).group_by(one.c.state) for one in found))
    by_state = {row[0]: row[1] for row in await connection.execute(numbers)}
    number = min(sum(by_state.values()), COUNTED + 1)
    return Counts(number, by_state if number <= COUNTED or not is_small else None)


async def in_states(
    connection: AsyncConnection,
    ids: Sequence[str],
    states: Set[str],
    *,
    are_acknowledged: bool = False,
) -> list[Mapping[Any, Any]]:
    """The id, task, state, slot and created_at of those of these few runs that are in one of the
    states, in the order of the ids. `are_acknowledged`: only those that a person has acknowledged.
    """
    columns = (runs.c[name] for name in ("id", "task", "state", "slot", "created_at"))
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    query = select(*columns).where(theirs, runs.c.state.in_(sorted(states)))
    if are_acknowledged:
        query = query.where(runs.c.acknowledged.is_not(None))
    found = {row["id"]: row for row in (await connection.execute(query)).mappings()}
    return [found[id] for id in ids if id in found]


def _looked(
    query: RunQuery, at: ColumnElement[datetime], before: Key | None, names: Set[str], number: int
) -> Subquery:
    """These columns of the rows that the page reads, at most this many, found by an index and read
    in its order.
    """
    whole = select(*(runs.c[name] for name in sorted(names))).where(*_within(query, at, before))
    newest = (runs.c[str(at.key)].desc(), runs.c.id.desc())
    # PostgreSQL has no statistics of PART_SQL, and expects few parts; and it expects that most runs
    # of a state are counted. A limit whose value it doesn't know keeps it from reading and sorting
    # all of them.
    is_count = number > LOOKED
    most = select(literal(number)).scalar_subquery() if is_count or _has_parts(query) else number
    found = [whole.where(*search).order_by(*newest).limit(most) for search in _searches(query)]
    if len(found) == 1:
        return found[0].subquery()
    every = union_all(*(each.subquery().select() for each in found)).subquery()
    return (
        select(every)
        .order_by(every.c[str(at.key)].desc(), every.c.id.desc())
        .limit(number)
        .subquery()
    )


def _searches(query: RunQuery) -> Iterator[list[Any]]:
    """The conditions of each search. The index of each gives the rows in order, except for the
    parts of one run.
    """
    of_task = [runs.c.task == query.task] if query.task is not None else []
    of_states = [runs.c.state.in_(sorted(query.states))] if query.states else []
    if query.ids:
        yield [runs.c.id.in_(sorted(query.ids)), *of_task, *of_states, *_of_parent(query)]
        return
    if query.parent is not None:
        yield [
            *_of_parent(query),
            runs.c.origin == Origin.PART,
            *of_task,
            *of_states,
        ]
        return
    if query.by_slot or not query.origins or query.origins - PARTS:
        by_state = (
            [[runs.c.state == state] for state in sorted(query.states)]
            if _is_by_state(query)
            else [[]]
        )
        of_error = [runs.c.fingerprint == query.fingerprint] if _is_by_error(query) else []
        for of_state in by_state:
            yield [text(NO_PART_SQL), *of_task, *of_error, *of_state]
    if _has_parts(query):
        for state in sorted(query.states or RunState):
            yield [text(PART_SQL), runs.c.state == state]


def _of_parent(query: RunQuery) -> list[Any]:
    return [runs.c.awaited_by == query.parent] if query.parent is not None else []


def _is_by_state(query: RunQuery) -> bool:
    """Whether the search has the condition on states: an index finds those of one state, or of
    several rare ones, and few runs are named.
    """
    are_rare = bool(query.states) and RunState.SUCCEEDED not in query.states
    is_named = query.parent is not None or bool(query.ids)
    return is_named or (query.task is None and (len(query.states) == 1 or are_rare))


def _is_by_error(query: RunQuery) -> bool:
    """Whether the search has the condition on the error: an index finds the runs of a task's
    error.
    """
    is_named = query.parent is not None or bool(query.ids)
    is_of_task = query.task is not None and query.fingerprint is not None
    return is_of_task and not (is_named or query.by_slot or Origin.PART in query.origins)


def _has_parts(query: RunQuery) -> bool:
    """Whether parts of any runs are wanted. Their index has them by their states, and not by their
    tasks.
    """
    is_named = query.parent is not None or bool(query.ids)
    return Origin.PART in query.origins and not is_named and not query.by_slot


def _within(
    query: RunQuery, at: ColumnElement[datetime], before: Key | None
) -> Iterator[ColumnElement[bool]]:
    """The interval of the list, and the place in it at which the page begins."""
    if query.by_slot:
        yield text(OF_SLOT_SQL)  # type: ignore[misc]
        # PostgreSQL would begin with the parts of the task, which have no slot.
        yield at.is_not(None)
        since, until = query.slot_since, query.slot_until
    else:
        since, until = query.created_since, query.created_until
        if query.ended_until is not None:  # a run that has ended by then was made before
            until = query.ended_until if until is None else min(until, query.ended_until)
    if since is not None:
        yield at >= since
    if until is not None:
        yield at < until
    if before is not None:
        instant, run = before
        # A comparison of rows, which both databases look up in the index. With an OR, they would
        # read all earlier pages.
        yield tuple_(at, runs.c.id) < tuple_(
            literal(instant, at.type), literal(run, runs.c.id.type)
        )


def _others(query: RunQuery, columns: Columns, kind: str) -> Iterator[ColumnElement[bool]]:
    """The conditions that are checked on the rows that were read."""
    if query.states and not _is_by_state(query):
        yield columns.state.in_(sorted(query.states))
    if query.task is not None and _has_parts(query):
        yield columns.task == query.task
    if query.tasks is not None:
        yield columns.task.in_(sorted(query.tasks))
    if query.without:
        yield columns.task.not_in(sorted(query.without))
    if query.origins and not (query.origins == PARTS and _has_parts(query)):
        yield columns.origin.in_(sorted(query.origins))
    if query.node is not None:
        yield columns.node == query.node
    made, slots = (query.created_since, query.created_until), (query.slot_since, query.slot_until)
    name, interval = ("created_at", made) if query.by_slot else ("slot", slots)
    for column, (since, until) in {
        name: interval,
        "finished_at": (query.ended_since, query.ended_until),
    }.items():
        if since is not None:
            yield columns[column] >= since
        if until is not None:
            yield columns[column] < until
    for name, value in query.params.items():
        yield _parameter(columns.params, name, kind).in_(_json_texts(value))
    if query.fingerprint is not None and not _is_by_error(query):
        yield columns.fingerprint == query.fingerprint
    if query.text is not None:
        yield columns.reason.icontains(query.text, autoescape=True)


def _parameter(column: ColumnElement[Any], name: str, kind: str) -> ColumnElement[str]:
    """The JSON text of one parameter. `name` has been checked to be an identifier."""
    if kind == "postgresql":
        return cast(column.op("->")(type_coerce(name, Text())), Text())
    return type_coerce(column.op("->")(type_coerce(f'$."{name}"', Text())), Text())


def _json_texts(value: str) -> list[str]:
    """The JSON texts that a value stands for: the text itself, and the number, true, false or null
    of this spelling.
    """
    texts = [json.dumps(value), json.dumps(value, ensure_ascii=False)]
    try:
        is_scalar = not isinstance(json.loads(value), dict | list | str)
    except ValueError:
        is_scalar = False
    return [*texts, value] if is_scalar else texts
