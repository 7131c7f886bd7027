"""What may start, in SQL: the tasks that have something, and the first runs of a queue. Looks at nothing else.

A backlog of a task that this node has not loaded, of one that is paused, or of retries that are due tomorrow costs no
more than a few looks into an index. What waits and what is retried later are looked at apart: they have indexes of
their own. The tasks are found by jumping from one to the next, which a recursive query does in both databases.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BindParameter, bindparam

from service.batch.ledger.states import Rank
from service.batch.ledger.tables import RETRYING_SQL, WAITING_SQL, not_held, runs

RANKS = (Rank.INTERRUPTED, Rank.ON_TIME, Rank.MANUAL, Rank.CATCH_UP)

WAITS = WAITING_SQL
RETRIES = RETRYING_SQL


def names(condition: str, until_found: bool = False) -> str:
    """A query for the tasks that have such runs, one of which at least no pause holds.

    `condition`: WAITS or RETRIES. `until_found`: no more than the first of these tasks.
    """
    # No EXISTS, which PostgreSQL would make a join with all paused tasks.
    paused_at = "SELECT t.paused_at FROM batch_tasks t WHERE t.name = w.task"
    newest = f"SELECT max(y.created_at) FROM batch_runs y WHERE y.task = w.task AND {condition}"
    held = f"coalesce(({paused_at}) >= ({newest}), false)"
    following = f"SELECT min(r.task) FROM batch_runs r WHERE {condition} AND r.task > w.task"
    goes_on = f" AND {held}" if until_found else ""
    return (
        f"WITH RECURSIVE w(task) AS (SELECT min(task) FROM batch_runs WHERE {condition} UNION ALL "
        f"SELECT ({following}) FROM w WHERE w.task IS NOT NULL{goes_on}) "
        f"SELECT w.task FROM w WHERE w.task IS NOT NULL AND NOT {held}"
    )


def first(of: str, limit: str, retries: bool, also: str = "true", lock: str = "") -> str:
    """A query for the ids of the first runs of a queue of the task `v.task`.

    `of`: "exclusive = v.task", or "exclusive IS NULL" for what is in no queue. `retries`: some are due at :now.
    """
    shape = "SELECT q.id, q.rank, q.due_at FROM batch_runs q WHERE q.task = v.task AND q."
    may_start = f"{not_held('q')} AND {also}"
    # PostgreSQL has no statistics of WAITING_SQL, so it expects few runs to wait: fewer than the limit. Then it would
    # read and sort the whole backlog. A limit whose value it doesn't know has it follow the order of the index.
    order = f"ORDER BY q.exclusive, q.rank, q.due_at, q.id LIMIT (SELECT {limit}){lock}"
    parts = [f"{shape}{of} AND {WAITING_SQL} AND {may_start} {order}"]
    if retries:
        due = f"{RETRYING_SQL} AND q.due_at <= :now"
        parts += [f"{shape}{of} AND q.rank = {rank} AND {due} AND {may_start} {order}" for rank in RANKS]
    if len(parts) == 1:
        return f"SELECT id FROM ({parts[0]}) AS heads"
    together = " UNION ALL ".join(f"SELECT * FROM ({part}) AS part{number}" for number, part in enumerate(parts))
    return f"SELECT id FROM ({together}) AS heads ORDER BY rank, due_at, id LIMIT {limit}"


def among(column: str, query: str, kind: str) -> str:
    """`column IN (query)`, in the form by which PostgreSQL looks into the index of the column."""
    return f"{column} = ANY(ARRAY({query}))" if kind == "postgresql" else f"{column} IN ({query})"


def parameters(retries: bool) -> list[BindParameter[Any]]:
    """What `first` has to be told."""
    return [bindparam("now", type_=runs.c.due_at.type)] if retries else []
