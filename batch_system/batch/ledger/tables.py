"""The tables of the ledger."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    text,
)

from batch_system.batch.ledger.states import ACTIVE, CLAIMABLE, Rank, RunState
from batch_system.database.types import Id, Json, UtcDateTime
from batch_system.database.types import new_id as new_id
from batch_system.settings.pools import DEFAULT_POOL

ledger = MetaData()


def where(condition: str) -> dict[str, Any]:
    """The keyword arguments for the condition of a partial index on both databases."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


# A partial index is used only by a query that repeats its condition exactly. With the bare column
# SQLite would use the index on all states instead, and read the runs of all tasks.
UNINDEXED_STATE = "(state || '')"
# For statements that find runs by their ids: no index has the state in this form, not even a
# partial one.
PLAIN_STATE = "coalesce(state, '')"


def is_one_of(states: Iterable[RunState], column: str = UNINDEXED_STATE) -> str:
    """The condition that a run is in one of these states."""
    return f"{column} IN ({', '.join(repr(str(state)) for state in states)})"


READY_SQL = is_one_of(state for state in CLAIMABLE if state != RunState.RETRYING)
"""Runs that may start now. Their `due_at` does not matter: it may be from a clock that was ahead.
"""
HIGH_SQL = f"rank = {Rank.INTERRUPTED} AND {READY_SQL}"
"""Those of them that go before the others of their queue."""
RETRYING_SQL = f"{UNINDEXED_STATE} = 'retrying'"
"""Runs that may start at their `due_at`."""
HELD_SQL = f"{UNINDEXED_STATE} = 'running'"
"""Running runs, in the form that uses the index on nodes."""
LEFT_SQL = f"{UNINDEXED_STATE} = 'interrupted'"
"""Runs that were interrupted and wait for a node, in the form that uses the index on the node that
left them.
"""
RUNNING_SQL = "state = 'running'"
HOLDS_LANE_SQL = "attempt > attempts_before AND state IN ('running', 'waiting', 'queued')"
"""Runs that hold a lane. A run that has begun also holds it while it waits for its parts, and then
until its attempt goes on.
"""
WAITING_SQL = f"{UNINDEXED_STATE} = 'waiting'"
"""Runs that wait for their `due_at`, for other slots, for the other runs of their group, or for
their parts.
"""
CLAIMABLE_SQL = is_one_of(CLAIMABLE)
ACTIVE_SQL = is_one_of(ACTIVE, "state")
SKIPPED_SQL = f"{UNINDEXED_STATE} = 'skipped'"
BY_HAND_SQL, NO_PART_SQL = "origin = 'manual'", "origin <> 'part'"
PART_SQL = "(origin || '') = 'part'"
"""Parts of any runs, in the form that uses the index on parts. The parts of one run are found by
that run.
"""
OF_SLOT_SQL = "origin <> 'manual'"
"""Runs of slots, written exactly as in the unique index on task and slot, which is used only for
this condition.
"""
UNNOTICED_RUN_SQL = (
    f"noticed_at IS NULL AND ({UNINDEXED_STATE} = 'failed' OR fingerprint IS NOT NULL)"
)
"""Runs that the watch has to look at: they have failed, or ended otherwise after something was
wrong with them.
"""
OPEN_FAILURE_SQL = "fingerprint IS NOT NULL AND acknowledged IS NULL AND made_good_at IS NULL"
"""Runs in which something went wrong that was neither made good nor acknowledged."""
OF_ERROR_SQL = f"{NO_PART_SQL} AND fingerprint IS NOT NULL"
"""Runs in which something went wrong, whatever became of it."""
UNNOTICED_RANGE_SQL, UNNOTICED_NODE_SQL = "unnoticed IS NOT NULL", "noticed_at IS NULL"
UNNOTICED_BACKUP_SQL = "failed_at IS NOT NULL AND noticed_at IS NULL"
BEGUN_OR_READY = tuple(state for state in ACTIVE if state != RunState.WAITING)
IN_THE_WAY_SQL = (
    f"{is_one_of(BEGUN_OR_READY)} AND ({RUNNING_SQL} OR (origin = 'schedule' AND NOT catch_up))"
)
"""Runs that an overlap policy considers for the next slot: all running ones, and those of slots on
time.
"""


def not_held(run: str) -> str:
    """The condition that no pause holds a run. A pause holds the runs of its task that were created
    before it.

    `run`: the alias of batch_runs. It is not a join, so that runs are still read in the order of
    the queue's index.
    """
    return (
        f"coalesce({run}.created_at > (SELECT t.paused_at FROM batch_tasks t "
        f"WHERE t.name = {run}.task), true)"
    )


tasks = Table(
    "batch_tasks",
    ledger,
    Column("name", String(100), primary_key=True),
    Column("description", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("policies", Json, nullable=False),
    Column("paused_at", UtcDateTime),
    Column("paused_by", Text),
    Column("first_seen_at", UtcDateTime, nullable=False),
    Column("last_seen_at", UtcDateTime, nullable=False),
    Column("removed_at", UtcDateTime),
    Column("accounted_from", UtcDateTime),
    Column("pool", String(40), nullable=False, server_default=DEFAULT_POOL),
    # What a process that has not loaded the task must know about it: the tags, the JSON schema of
    # its parameters, and what it declares about its monitoring.
    Column("tags", Json),
    Column("parameters", Json),
    # The queue of the runs of its slots, if the task has a limit; null: that of its name, or none.
    Column("queue", String(120)),
    Column("monitoring", Json),
    # `muted_until`: until then nothing is sent about the task. `deadline_until`: up to then its
    # deadlines were checked.
    Column("muted_until", UtcDateTime),
    Column("deadline_until", UtcDateTime),
    Column("muted_by", Text),
    Column("mute_note", Text),
    Column("paused_until", UtcDateTime),  # null: until somebody resumes it
    # The beginning of the SHA-256 of its file; NULL: not known.
    Column("digest", String(16)),
    Column("maintenance", Id),  # the window that has paused it; null: a person has paused it alone
)

schedules = Table(
    "batch_schedules",
    ledger,
    Column("id", Id, primary_key=True),
    Column("task", String(100), nullable=False),
    Column("cron", Text, nullable=False),
    Column("timezone", String(100), nullable=False),
    Column("valid_from", UtcDateTime, nullable=False),
    Column("valid_until", UtcDateTime),
    Column("node", Id, nullable=False),
    Column("fired_until", UtcDateTime, nullable=False),
    # `after`: what the runs of its slots wait for, see queue/after.py. `follows`: the task whose
    # schedule it copies. `given`: the expression as it was written, if that has an `H`.
    Column("after", Json),
    Column("follows", String(100)),
    Column("given", Text),
    Index("uq_batch_schedules_open", "task", unique=True, **where("valid_until IS NULL")),
    Index("ix_batch_schedules_task", "task", "valid_from"),
)

runs = Table(
    "batch_runs",
    ledger,
    Column("id", Id, primary_key=True),
    Column("task", String(100), nullable=False),
    Column("slot", UtcDateTime),
    Column("origin", String(20), nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text),
    Column("params", Json),
    Column("result", Json),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("rank", SmallInteger, nullable=False),
    Column("catch_up", Boolean, nullable=False),
    Column("exclusive", String(120)),
    Column("lane", SmallInteger, nullable=False, server_default="1"),
    Column("due_at", UtcDateTime, nullable=False),
    # `attempts_before`: attempts before a person's last retry. `losses`: how often its node was
    # lost without progress.
    Column("attempt", Integer, nullable=False, server_default="0"),
    Column("attempts_before", Integer, nullable=False, server_default="0"),
    Column("losses", Integer, nullable=False, server_default="0"),
    Column("node", Id),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    # Progress. `count_before`: items done by earlier attempts. `count_lost`: the largest count at a
    # loss. `rate`: items per second. `progress_at`: the instant since which `count` has this value.
    Column("count", BigInteger),
    Column("total", BigInteger),
    Column("count_before", BigInteger),
    Column("count_lost", BigInteger),
    Column("message", Text),
    Column("rate", Float),
    Column("progress_at", UtcDateTime),
    Column("requested_by", Text),
    Column("key", String(200)),
    Column("parent", Id),
    # `awaited_by`: the run that waits for this one. Of a waiting run, `gate` says which end of what
    # it waits for opens it ("success" or "end"), and `wait_until` when it has waited long enough. A
    # run that was skipped because of what it waited for keeps its gate.
    Column("awaited_by", Id),
    Column("gate", String(10)),
    Column("wait_until", UtcDateTime),
    Column("part", Integer),  # the number of a part, from 1; NULL for other runs
    # The OpenTelemetry span that asked for the run, as in the header `traceparent`.
    Column("traceparent", String(55)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("attempt_started_at", UtcDateTime),
    Column("finished_at", UtcDateTime),
    # The request to cancel a running run, which its node reads (see nodes/ledger_poll.py).
    Column("cancel_at", UtcDateTime),
    Column("cancel_by", Text),
    Column("cancel_reason", Text),
    # `fingerprint`: what is wrong with the run, as a class of errors; NULL if nothing is.
    # `noticed_at`: when the watch has seen how it ended. `acknowledged`: the incident with which a
    # person has acknowledged it. `made_good_by`: the run whose success made it good, which may be
    # the run itself.
    Column("fingerprint", String(40)),
    Column("noticed_at", UtcDateTime),
    Column("acknowledged", Id),
    Column("made_good_at", UtcDateTime),
    Column("made_good_by", Id),
    # There may be any number of manual runs for a slot.
    Index("uq_batch_runs_task_slot", "task", "slot", unique=True, **where(OF_SLOT_SQL)),
    Index("uq_batch_runs_task_key", "task", "key", unique=True, **where("key IS NOT NULL")),
    Index("uq_batch_runs_exclusive", "exclusive", "lane", unique=True, **where(HOLDS_LANE_SQL)),
    Index("ix_batch_runs_held", "node", **where(HELD_SQL)),
    Index("ix_batch_runs_left", "node", **where(LEFT_SQL)),
    Index("ix_batch_runs_in_the_way", "task", **where(IN_THE_WAY_SQL)),
    # Which tasks have runs to start, and the order of these runs: for waiting runs, and for
    # retries.
    Index("ix_batch_runs_waiting", "task", "created_at", **where(READY_SQL)),
    Index("ix_batch_runs_queue", "task", "exclusive", "rank", "due_at", "id", **where(READY_SQL)),
    Index("ix_batch_runs_high", "task", "due_at", **where(HIGH_SQL)),
    Index("ix_batch_runs_retry_due", "due_at", **where(RETRYING_SQL)),
    Index("ix_batch_runs_retrying", "task", "created_at", **where(RETRYING_SQL)),
    Index(
        "ix_batch_runs_retry_queue",
        "task",
        "exclusive",
        "rank",
        "due_at",
        "id",
        **where(RETRYING_SQL),
    ),
    Index("ix_batch_runs_task_created", "task", "created_at", "id", **where(NO_PART_SQL)),
    Index("ix_batch_runs_state_created", "state", "created_at", "id", **where(NO_PART_SQL)),
    Index("ix_batch_runs_created", "created_at", "id", **where(NO_PART_SQL)),
    Index("ix_batch_runs_parts", "state", "created_at", "id", **where(PART_SQL)),
    Index("ix_batch_runs_by_hand", "created_at", **where(BY_HAND_SQL)),
    Index("ix_batch_runs_skipped", "slot", **where(SKIPPED_SQL)),
    Index("ix_batch_runs_unnoticed", "id", **where(UNNOTICED_RUN_SQL)),
    Index(
        "ix_batch_runs_open_failures",
        "task",
        "fingerprint",
        "finished_at",
        **where(OPEN_FAILURE_SQL),
    ),
    Index(
        "ix_batch_runs_error",
        "task",
        "fingerprint",
        "created_at",
        "id",
        **where(OF_ERROR_SQL),
    ),
    Index("ix_batch_runs_parent", "parent", **where("parent IS NOT NULL")),
    Index("ix_batch_runs_waits", "due_at", "id", **where(WAITING_SQL)),
    Index("ix_batch_runs_members", "awaited_by", "state", **where("awaited_by IS NOT NULL")),
    Index("ix_batch_runs_acknowledged", "acknowledged", **where("acknowledged IS NOT NULL")),
)

# How long runs of a task take, in seconds, over the last `runs` ones that have succeeded, and the
# last success.
durations = Table(
    "batch_durations",
    ledger,
    Column("task", String(100), primary_key=True),
    Column("p50", Float),
    Column("p95", Float),
    Column("longest", Float),
    Column("runs", Integer, nullable=False),
    Column("last_success_at", UtcDateTime),
    Column("computed_at", UtcDateTime, nullable=False),
)

# A running attempt is kept in the row of its run. A row is written here once, when the attempt has
# ended. An interrupted run goes on with the same attempt, which then has another row with another
# fence.
attempts = Table(
    "batch_attempts",
    ledger,
    Column("run", Id, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("number", Integer, nullable=False),
    Column("node", Id),
    Column("started_at", UtcDateTime, nullable=False),
    Column("ended_at", UtcDateTime, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("error", Json),
    PrimaryKeyConstraint("run", "fence"),
)

missed = Table(
    "batch_missed",
    ledger,
    Column("id", Id, primary_key=True),
    Column("task", String(100), nullable=False),
    Column("first_slot", UtcDateTime, nullable=False),
    Column("last_slot", UtcDateTime, nullable=False),
    Column("count", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    # `cause`: why, as a word; see missed_ranges.Cause. `unnoticed`: how many of the slots the watch
    # has not seen yet.
    Column("cause", String(20), nullable=False, server_default="other"),
    Column("unnoticed", BigInteger),
    # Who decided that nothing has to be done about these slots, and why.
    Column("left_at", UtcDateTime),
    Column("left_by", Text),
    Column("left_note", Text),
    Index("ix_batch_missed_task", "task", "last_slot"),
    Index("ix_batch_missed_unnoticed", "id", **where(UNNOTICED_RANGE_SQL)),
)

nodes = Table(
    "batch_nodes",
    ledger,
    Column("id", Id, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", String(40), nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("beats", BigInteger, nullable=False, server_default="0"),
    Column("seen_at", UtcDateTime, nullable=False),
    Column("draining", Boolean, nullable=False),
    Column("loop_lag", Float, nullable=False, server_default="0"),
    Column("tasks", Json, nullable=False),
    Column("stopped_at", UtcDateTime),
    # False for a process that executes only the run it was started for, such as `batch run`.
    Column("fires", Boolean, nullable=False, server_default=text("true")),
    Column("application", String(100)),  # its version; `version` is that of this package
    Column("capacity", Integer),  # how many runs it executes at once, at most; NULL: not known
    Column("pools", Json),  # the names of the pools whose runs it claims; NULL: not known
    # `lost_at`: when it was found dead; NULL for a node that stopped by itself. `broken`: the files
    # of tasks that it can't use, and why. `noticed_at`: when the watch has seen this row; NULL
    # after it was lost or `broken` changed.
    Column("lost_at", UtcDateTime),
    Column("noticed_at", UtcDateTime),
    Column("broken", Json),
    # Why it is not ready, or what holds up its runs, by part; NULL or empty: nothing.
    Column("troubles", Json),
    # The newest migration of the ledger that its code knows; NULL: of code from before windows.
    Column("ledger", String(100)),
    # What its calls of the dead man's switch came to: `good_at`, when the last one succeeded; if
    # they fail since then, `failed_at` and `error`, of the last one. NULL: it has called none.
    Column("ping", Json),
    Index("ix_batch_nodes_unnoticed", "id", **where(UNNOTICED_NODE_SQL)),
    Index("ix_batch_nodes_live", "id", "fires", **where("stopped_at IS NULL")),
)

# Which code may work with the ledger: database.migrate.Window.
windows = Table(
    "batch_windows",
    ledger,
    Column("history", String(100), primary_key=True),
    Column("oldest", String(100), nullable=False),
    Column("version", String(40), nullable=False),
)

# The first version rises with each change of tasks or schedules that other nodes have to follow;
# the others: wakes.py.
catalog = Table(
    "batch_catalog",
    ledger,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
)

log = Table(
    "batch_log",
    ledger,
    Column("run", Id, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("first_line", Integer, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("block", LargeBinary, nullable=False),
    PrimaryKeyConstraint("run", "fence", "first_line"),
)

# Deleted runs of which logs, or rows in the application database, may still have to be deleted.
pruned = Table("batch_pruned", ledger, Column("run", Id, primary_key=True))

backups = Table(
    "batch_backups",
    ledger,
    Column("name", String(100), primary_key=True),
    Column("place", Text, primary_key=True),
    Column("taken_at", UtcDateTime, nullable=False),
    Column("size", BigInteger),
    Column("rows", BigInteger),
    Column("tables", BigInteger),
    Column("taken_by_run", Id),
    Column("verified_at", UtcDateTime),
    Column("failed_at", UtcDateTime),
    Column("restored_at", UtcDateTime),
    Column("kind", Text),
    Column("database", Text),
    Column("revision", Text),
    Column("verified_how", Text),
    Column("failed_check", Text),
    Column("manifest", String(64)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("noticed_at", UtcDateTime),  # when the watch has seen that a check failed
)
