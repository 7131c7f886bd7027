"""The plans of the statements that are executed often: each uses an index, and none reads all runs.

The statements are recorded while the functions execute them, on a ledger with many rows that they
do not need. An index that no plan here uses is superfluous.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.chunks import quarantine
from batch_system.batch.chunks.checkpoints import UPSERT_WITH_FENCE
from batch_system.batch.chunks.keyset_pages import Pages
from batch_system.batch.firing import firing, pauses
from batch_system.batch.incidents import durations, noticing, promises, telling
from batch_system.batch.incidents.checks import Checks
from batch_system.batch.incidents.watched import Thresholds, WatchedTask, answering, watched_tasks
from batch_system.batch.ledger import (
    attempts,
    buckets,
    duties,
    gauges,
    merges,
    missed_ranges,
    nodes,
    run_ids,
    run_query,
    runs,
    schedules,
    tables,
    transitions,
    waits,
)
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.buckets import CLASSES
from batch_system.batch.ledger.incidents import acknowledging, incidents, outbox
from batch_system.batch.ledger.incidents import tables as incident_tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.people import access, access_tables, audit, previews
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.night import tally
from batch_system.batch.nodes import ledger_poll, orphans
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.nodes.roles import BY_HAND, Roles
from batch_system.batch.placing.demand import demand, running
from batch_system.batch.placing.placing import DUTY
from batch_system.batch.queue import cancel, claiming, enqueue, retry, unserved
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.batch.tasks.registry import Task
from batch_system.config import Settings
from batch_system.database import companions
from batch_system.database.engine import Database
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.night import attention as night_needs
from batch_system.operations.night import did_not_run
from batch_system.operations.night import night as night_reading
from batch_system.operations.night.results import SlotCounts
from batch_system.operations.operations import Operations
from batch_system.operations.runs import finding, phases
from batch_system.operations.runs import late as night_late
from batch_system.operations.tasks import history, overview
from batch_system.operations.why import room as rooms
from batch_system.settings.pools import DEFAULT_POOL
from batch_system.verbs.incidents import ListIncidents
from batch_system.verbs.night import ShowStatus
from batch_system.verbs.runs import ListRuns
from batch_system.verbs.why import WhyRun, WhyTask
from service.application.models import User
from tests.batch import planned_limits, planned_starts
from tests.batch.crowd import crowd
from tests.batch.ledger_world import NODE, know, make_task
from tests.batch.test_runs import new
from tests.kinds import KINDS
from tests.migrations import APPLICATION_HISTORIES
from tests.waiting import planned

RUNS = 20_000
KEPT = 490
"""How many runs of a task are kept: of each task with 500 ended runs ten are pruned."""

LARGE = {
    *(table.name for table in tables.ledger.tables.values()),
    "batch_checkpoints",
    "batch_once",
    "batch_quarantine",
    "batch_starts",
    "users",
}
LARGE -= {"batch_catalog", "batch_backups", "batch_duties", "batch_maintenance"}

ONCE_AN_HOUR = {"prune", "unserved", "prune limits"}
"""Functions that may scan other tables than that of the runs."""

IN_ORDER = {
    "beat": r"(SCAN|Seq Scan on) batch_windows",
    "audit": r"USING INDEX ix_batch_events",
    "gauges of limits": r"(SCAN|Seq Scan on) batch_tasks$|USING INDEX uq_batch_runs_exclusive$",
    "gauges": r"batch_tasks t$|^SCAN t$|INDEX "
    r"(uq_batch_incidents_open|ix_batch_nodes_live|\w+_batch_quarantine_1)$"
    r"|INDEX (\w+_batch_nodes_1|pk_batch_nodes)$",
    "history": r"Seq Scan on batch_tally",  # of a day of one task, in a tally that is small here
    "list": r"USING INDEX ix_batch_runs",
    "list of parts and runs": r"USING INDEX ix_batch_runs",
    "search": r"USING (COVERING )?INDEX (ix_batch_runs_created|(uq|ix)_batch_incidents_open)$"
    r"|(SCAN|Seq Scan on) batch_tasks$",
    "a run by the end of its "
    "id": r"USING (COVERING )?INDEX (ix_batch_runs_created|sqlite_autoindex_batch_runs_1)$",
    "look": r"USING (COVERING )?INDEX "
    r"(ix_batch_nodes_live$|ix_batch_\w+_(unnoticed|unsent)|ix_batch_runs_held)",
    "night": r"(SCAN|Seq Scan on) batch_(tasks|log|schedules)|INDEX "
    r"(uq_batch_schedules_open|ix_batch_runs_(open_failures|held|retry_due)|ix_batch_nodes_live$"
    r"|(\w+_batch_(nodes|quarantine)_1|pk_batch_nodes)$)|Seq Scan on batch_(previews|durations)",
    "forecast": r"USING INDEX (ix_batch_nodes_live|ix_batch_runs_held)$"
    r"|INDEX (\w+_batch_nodes_1|pk_batch_nodes)$|Seq Scan on batch_durations",
    "notice": r"USING INDEX "
    r"(ix_batch_\w+_unnoticed|(uq|ix)_batch_incidents_open$|ix_batch_nodes_live)"
    r"|INDEX (\w+_batch_nodes_1|pk_batch_nodes)$",
    "check": r"USING INDEX "
    r"(uq_batch_incidents_open|ix_batch_incidents_open$|ix_batch_runs_held|ix_batch_nodes_live"
    r"|ix_batch_limits_failed)|(SCAN|Seq Scan on) batch_schedules"
    r"|Seq Scan on batch_(incidents|limits|tasks t_\d)",
    **dict.fromkeys(("claim", "claim retries"), r"USING INDEX ix_batch_runs_high$"),
    "claim with a limit": r"USING INDEX ix_batch_runs_(high|held)$",
    "first of all keys": r"SCAN q USING INDEX uq_batch_runs_exclusive$",
    "function of a limit": r"USING INDEX ix_batch_limits_failed|Seq Scan on batch_limits l$",
    "send": r"USING INDEX ix_batch_outbox_unsent",
    "incidents": r"USING INDEX (ix_batch_incidents_(open|closed)|uq_batch_incidents_open)",
    "tally": r"(SCAN|Seq Scan on) batch_(schedules|tasks)|USING INDEX ix_batch_buckets_dirty",
    "overview": r"(SCAN|Seq Scan on) (batch_(tasks|schedules|nodes)\b|t$|batch_tally t$)"
    r"|INDEX (ix_batch_runs_(held|open_failures)|ix_batch_nodes_live"
    r"|(\w+_batch_quarantine_1|pk_batch_quarantine)$)",
    "why": r"(SCAN|Seq Scan on) (batch_(tasks|schedules|nodes)\b|t$)"
    r"|INDEX (ix_batch_incidents_open(ed)?|uq_batch_incidents_open|ix_batch_runs_(held|retry_due)"
    r"|ix_batch_nodes_live|ix_batch_events_action|\w+_batch_(nodes|quarantine)_1"
    r"|pk_batch_(nodes|quarantine))$|Seq Scan on batch_quarantine$",
    "strip": r"USING INDEX ix_batch_nodes_live$",
    "tickets": r"USING (COVERING )?INDEX ix_batch_runs_(held|high$)",
}
"""Scans that are allowed: a list stops after a page, and a search after 100,000 ids, and so do the
count of items in quarantine and the search for the newest processes; the indexes of nodes and
incidents have only living and open ones; monitoring and the page of tasks show each task; cursors
are looked through when a clock was set back; PostgreSQL scans the few previews of a day, and the
tally, the durations and the numbers of limits while they are as few as here; there is one window
for each history.
"""

PLANS = {
    "fire": {"uq_batch_schedules_open", "ix_batch_runs_in_the_way", "ix_batch_missed_task"},
    "claim": {
        *(
            "ix_batch_runs_high",
            "ix_batch_runs_waiting",
            "ix_batch_runs_queue",
            "ix_batch_runs_retry_due",
            "ix_batch_runs_retry_queue",
        ),
        "uq_batch_runs_exclusive",
    },
    "claim retries": {
        *(
            "ix_batch_runs_high",
            "ix_batch_runs_waiting",
            "ix_batch_runs_queue",
            "ix_batch_runs_retry_due",
            "ix_batch_runs_retry_queue",
        ),
        *("ix_batch_runs_retrying", "uq_batch_runs_exclusive"),
    },
    "gauges": {
        *(
            "ix_batch_runs_state_created",
            "ix_batch_runs_task_created",
            "ix_batch_runs_waiting",
            "ix_batch_runs_queue",
        ),
        *("uq_batch_incidents_open", "ix_batch_nodes_live", "ix_batch_runs_parts"),
    },
    "look": {
        *(
            "ix_batch_runs_waiting",
            "ix_batch_runs_retry_due",
            "ix_batch_runs_retrying",
            "ix_batch_runs_held",
        ),
        *(
            "ix_batch_nodes_live",
            "ix_batch_runs_unnoticed",
            "ix_batch_missed_unnoticed",
            "ix_batch_nodes_unnoticed",
        ),
        *("ix_batch_outbox_unsent", "ix_batch_runs_waits"),
    },
    "strip": {"ix_batch_nodes_live", "ix_batch_runs_held"},
    "notice": {
        *(
            "ix_batch_runs_unnoticed",
            "ix_batch_missed_unnoticed",
            "ix_batch_nodes_unnoticed",
            "ix_batch_runs_left",
        ),
        *("ix_batch_incidents_opened", "ix_batch_incidents_quiet"),
    },
    "check": {
        *(
            "ix_batch_runs_waiting",
            "ix_batch_runs_queue",
            "ix_batch_runs_held",
            "ix_batch_runs_left",
        ),
        *("ix_batch_runs_open_failures", "ix_batch_runs_task_created", "uq_batch_schedules_open"),
        *(
            "ix_batch_outbox_due",
            "ix_batch_runs_retrying",
            "ix_batch_runs_retry_queue",
            "ix_batch_waits_slot",
        ),
    },
    "send": {"ix_batch_outbox_unsent"},
    "incidents": {
        *("ix_batch_incidents_open", "ix_batch_incidents_opened", "ix_batch_incidents_closed"),
        *("ix_batch_runs_open_failures", "ix_batch_runs_acknowledged", "ix_batch_outbox_created"),
    },
    "tally": {
        "ix_batch_buckets_dirty",
        "ix_batch_tally_unaccounted",
        "ix_batch_tally_not_all_good",
    },
    "night": {
        *("ix_batch_runs_retrying", "ix_batch_runs_retry_queue"),
        *(
            "ix_batch_runs_held",
            "ix_batch_runs_waiting",
            "ix_batch_runs_queue",
            "ix_batch_runs_open_failures",
        ),
        *("ix_batch_runs_skipped", "ix_batch_incidents_closed", "ix_batch_runs_task_created"),
        *("ix_batch_runs_retry_due", "ix_batch_incidents_opened", "ix_batch_runs_by_hand"),
        *(
            "ix_batch_tally_not_all_good",
            "ix_batch_events_at",
            "ix_batch_waits_slot",
            "ix_batch_runs_waits",
        ),
        *("ix_batch_runs_state_created", "ix_batch_runs_parts", "ix_batch_runs_in_the_way"),
    },
    "forecast": {
        *("ix_batch_runs_in_the_way", "ix_batch_runs_held"),
        *("ix_batch_runs_waiting", "ix_batch_runs_queue", "uq_batch_schedules_open"),
    },
    "beat": set(),
    "hold": {"ix_batch_runs_held"},
    "tickets": {
        *(
            "ix_batch_runs_high",
            "ix_batch_runs_waiting",
            "ix_batch_runs_queue",
            "ix_batch_runs_retry_due",
            "ix_batch_runs_retry_queue",
        ),
        *("uq_batch_runs_exclusive", "ix_batch_runs_held", "ix_batch_runs_retrying"),
    },
    "write": set(),
    "rescue": {"ix_batch_runs_held"},
    "retry": {"ix_batch_waits_slot", "ix_batch_runs_members"},
    "cancel": set(),
    "start": set(),
    "session": set(),
    "chunk": set(),
    "search": {
        *(
            "ix_batch_runs_created",
            "ix_batch_runs_task_created",
            "ix_batch_runs_state_created",
        ),
        "uq_batch_schedules_open",
    },
    "list": {"ix_batch_runs_created", "ix_batch_runs_task_created", "ix_batch_runs_state_created"},
    "list of an error": {"ix_batch_runs_error"},
    "list of parts": {"ix_batch_runs_parts"},
    "list of parts and runs": {
        "ix_batch_runs_parts",
        "ix_batch_runs_created",
        "ix_batch_runs_task_created",
    },
    "list of the parts of a run": {"ix_batch_runs_members"},
    "count": {"ix_batch_runs_state_created"},
    "count of a task": {"ix_batch_runs_task_created"},
    "count of an error": {"ix_batch_runs_error"},
    "count of the parts of a run": {"ix_batch_runs_members"},
    "a run by the end of its id": {"ix_batch_runs_created"},
    "overview": {
        *(
            "ix_batch_runs_held",
            "ix_batch_runs_task_created",
            "ix_batch_runs_waiting",
            "ix_batch_runs_queue",
        ),
        *("ix_batch_runs_state_created", "ix_batch_runs_parts", "ix_batch_tally_not_all_good"),
        "ix_batch_runs_open_failures",
    },
    "show": {"ix_batch_runs_task_created", "ix_batch_missed_task", "ix_batch_runs_parent"},
    "prune": {
        "ix_batch_merged_at",
        "ix_batch_merges_until",
        *(
            "ix_batch_runs_created",
            "ix_batch_runs_task_created",
            "ix_batch_runs_held",
            "ix_batch_runs_members",
        ),
        *("ix_batch_sessions_expires", "ix_batch_previews_expires", "ix_batch_events_at"),
        *("ix_batch_incidents_closed", "ix_batch_outbox_created"),
    },
    "unserved": {"ix_batch_runs_waiting", "ix_batch_runs_retrying", "ix_batch_runs_retry_queue"},
    "audit": {"ix_batch_events_at", "ix_batch_events_action", "ix_batch_events_task"},
    "bulk": {"ix_batch_previews_open"},
    "open": {"ix_batch_runs_waits", "ix_batch_runs_members", "uq_batch_schedules_open"},
    "what failed runs keep back": {"ix_batch_runs_open_failures", "ix_batch_waits_slot"},
    "blocked runs": {"ix_batch_runs_waits", "ix_batch_runs_members", "uq_batch_schedules_open"},
    "a chain": {"ix_batch_waits_slot", "ix_batch_runs_members", "ix_batch_runs_waits"},
    "retry what others wait for": {"ix_batch_waits_slot", "ix_batch_runs_members"},
    "parts": {
        "ix_batch_runs_waits",
        "ix_batch_runs_members",
        "ix_batch_waits_slot",
        "uq_batch_schedules_open",
    },
    "cancel a group": {"ix_batch_runs_members"},
    "resume what waits": {"ix_batch_runs_waits"},
    "pause": {"uq_batch_schedules_open", "ix_batch_runs_waits"},
    "schedules of a task": {"ix_batch_schedules_task"},
    "hand over": {"ix_batch_starts_follow_up"},
    "merge": {"ix_batch_runs_waits"},
    "prune merges": {"ix_batch_merges_until", "ix_batch_merged_at"},
    "claim with a limit": {
        *("ix_batch_runs_queue", "ix_batch_runs_retry_queue", "uq_batch_runs_exclusive"),
        *("ix_batch_runs_waiting", "ix_batch_runs_retrying", "ix_batch_runs_retry_due"),
        *("ix_batch_runs_high", "ix_batch_runs_held"),
    },
    "first of all keys": {"uq_batch_runs_exclusive", "ix_batch_runs_high"},
    "start with a limit": {"ix_batch_runs_queue"},
    "keys": {
        *("ix_batch_runs_queue", "ix_batch_runs_retry_queue", "uq_batch_runs_exclusive"),
        "ix_batch_runs_open_failures",
    },
    "gauges of limits": {"ix_batch_runs_waiting"},
    "rate": set(),
    "function of a limit": {
        *("ix_batch_runs_queue", "ix_batch_runs_retry_queue", "ix_batch_limits_failed"),
    },
    "prune limits": {"ix_batch_rates_free_at"},
    "left queues": {"ix_batch_runs_queue", "ix_batch_runs_retry_queue"},
}
"""The indexes that each function uses, besides primary keys. It must use no others."""

HARMLESS = {
    "uq_batch_runs_task_slot",
    "uq_batch_runs_task_key",
    "uq_batch_runs_exclusive",
    "ix_batch_nodes_live",
}
HARMLESS |= {"ix_batch_missed_task", "uq_batch_events_key", "uq_batch_outbox_key"}
# Both have the open incidents, and no others.
HARMLESS |= {"uq_batch_incidents_open", "ix_batch_incidents_open"}
"""PostgreSQL names the indexes that an insert checks, and may use a small unique index to find one
row.
"""


BY_KIND = {
    "cancel": {"ix_batch_runs_members"},
    "count of a task": {"ix_batch_runs_created"},
    "overview": {"uq_batch_schedules_open", "ix_batch_runs_created"},
    "night": {"uq_batch_schedules_open", "ix_batch_previews_expires"},
    "unserved": {"ix_batch_runs_queue"},
    "check": {
        *("ix_batch_incidents_closed", "ix_batch_incidents_error", "ix_batch_limits_failed"),
    },
    "claim with a limit": {"ix_batch_rates_free_at"},
    "rate": {"ix_batch_rates_free_at"},
    "left queues": {"ix_batch_runs_waiting"},
    "prune": {"ix_batch_waits_slot", "ix_batch_merges_until", "ix_batch_merged_at"},
}
"""Only one of the two uses these. A cancel locks members on PostgreSQL; for the others there are
few rows here.
"""


class Plans:
    """The statements that each function has executed, and the plan of each."""

    def __init__(self, *databases: Database) -> None:
        self.sent: dict[str, dict[str, tuple[Database, Any]]] = {}
        self._name = ""
        for database in databases:
            for engine in {database.engine.sync_engine, database.reader.sync_engine}:
                event.listen(engine, "before_cursor_execute", self._keeper(database))

    def _keeper(self, database: Database) -> Any:
        def keep(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
            if self._name and statement.startswith(
                ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
            ):
                self.sent.setdefault(self._name, {}).setdefault(statement, (database, parameters))

        return keep

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._name = name
        yield
        self._name = ""

    async def read(self) -> dict[str, list[tuple[str, list[str]]]]:
        """By name of function: each statement with the lines of its plan."""
        found: dict[str, list[tuple[str, list[str]]]] = {}
        for name, statements in self.sent.items():
            for statement, (database, parameters) in statements.items():
                prefix = (
                    "EXPLAIN (COSTS OFF) "
                    if database.kind == "postgresql"
                    else "EXPLAIN QUERY PLAN "
                )
                async with database.engine.connect() as connection:
                    lines = await connection.exec_driver_sql(prefix + statement, parameters)
                    found.setdefault(name, []).append((statement, [str(row[-1]) for row in lines]))
        return found


@pytest.fixture(scope="module", params=KINDS)
async def plans(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, list[tuple[str, list[str]]]]]:
    databases, folder = (
        request.getfixturevalue(f"{request.param}_databases"),
        tmp_path_factory.mktemp("plans"),
    )
    urls = [
        await databases.make(folder / f"{n}.db", *histories)
        for n, histories in enumerate(((LEDGER_HISTORY,), APPLICATION_HISTORIES))
    ]
    ledger, application = (Database(url, setting="LEDGER_URL") for url in urls)
    kept = Plans(ledger, application)
    await _send_what_a_service_sends(kept, ledger, application)
    await _send_what_people_send(kept, ledger)
    await _send_what_the_watch_sends(kept, ledger, application)
    found, waiting = await kept.read(), Plans(ledger)
    await planned.fill(ledger, 3_000, clock.now())
    await planned.send(ledger, waiting.of, clock.now())
    starting = Plans(ledger, application)
    await planned_starts.fill(ledger, application, 3_000, clock.now())
    await planned_starts.send(ledger, application, starting.of, clock.now())
    taking_turns = Plans(ledger)
    tasks = await planned_limits.fill(ledger, 3_000, clock.now())
    await planned_limits.send(ledger, tasks, taking_turns.of, clock.now())
    yield {
        **found,
        **await waiting.read(),
        **await starting.read(),
        **await taking_turns.read(),
    }
    for database, url in zip((ledger, application), urls, strict=True):
        await database.dispose()
        await databases.drop(url)


async def _send_what_a_service_sends(plans: Plans, ledger: Database, application: Database) -> None:
    loaded = await _fill(ledger, application)
    async with ledger.engine.begin() as connection:
        with plans.of("fire"):
            await firing.fire(connection, [*loaded, "many-1"], loaded, NODE, Capacity(1, 1))
            await schedules.still_open(connection, ["many-1"])
        with plans.of("claim"):
            await claiming.take(connection, loaded, NODE, Capacity(3, 3))
    late = [new(name, state="retrying", exclusive=task.exclusive) for name, task in loaded.items()]
    dead = new(
        "plain.dead",
        state="running",
        node=await _node(ledger),
        attempt=1,
        attempt_started_at=clock.now(),
    )
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [*late, dead])
        with plans.of("claim retries"):
            claimed, _ = await claiming.take(connection, loaded, NODE, Capacity(9, 9))
        assert claimed
        with plans.of("look"):
            await ledger_poll.read(connection, NODE)
            for roles in (BY_HAND, Roles(fires=False, pools=frozenset({"gpu"}))):
                await ledger_poll.read(connection, NODE, roles)
        with plans.of("gauges"):
            await gauges.totals(connection)
            await gauges.oldest_waiting_since(connection)
            await gauges.task_rows(connection)
            await gauges.task_rows(connection, ["many-1"])
            await durations.outdated(connection, clock.now())
            await incidents.numbers_open(connection)
            await gauges.living_nodes(connection)
            await quarantine.waiting_by_task(application, 100)
        with plans.of("beat"):
            await nodes.beat(connection, NODE, 0.0)
        with plans.of("strip"):
            await nodes.firing_since(connection, clock.now() - timedelta(hours=1))
        with plans.of("tickets"):
            await duties.holder(connection, DUTY)
            await duties.is_free(connection, DUTY, 15.0)
            await demand(connection, loaded, DEFAULT_POOL, 4, await running(connection))
        with plans.of("hold"):
            held = await claiming.held_by(connection, NODE, [])
        with plans.of("write"):
            one = held[0]
            progress = {
                "count": 1,
                "total": None,
                "count_before": 0,
                "message": "",
                "progress_at": None,
                "rate": 1.0,
            }
            await attempts.write_progress(
                connection, [{"id": one.id, "fence": one.fence, **progress}]
            )
            ends = (
                one.id,
                one.fence,
                RunState.FAILED,
                "failed",
                1,
                NODE,
                one.task,
                one.attempt_started_at,
            )
            # The second time the ledger is asked whose ends were not written before.
            for _ in range(2):
                assert (
                    await transitions.finish(connection, [Outcome(*ends, ended_at=clock.now())])
                    == []
                )
        with plans.of("rescue"):
            assert await orphans.rescue(connection, {str(dead.node): 0}, clock.now())
        with plans.of("retry"):
            await retry.retry(connection, one.id, "ann")
    with plans.of("unserved"):
        await unserved.fail_unserved(ledger)
        await unserved.fail_left_parts(ledger, loaded)
    with plans.of("prune"):
        went = await Pruner(ledger, application, Keep(1, KEPT), pause=0).prune()
    assert went["runs"] == 100
    await _send_what_a_chunk_sends(plans, application)


async def _send_what_a_chunk_sends(plans: Plans, application: Database) -> None:
    pages: Pages[User] = Pages(select(User), User.id, 10)
    async with application.session() as db:
        first = await pages.load(db, None)
        with plans.of("chunk"):
            await pages.load(db, first.cursor)
            values = {
                "run": new_id(),
                "name": "chunks:1",
                "fence": 1,
                "cursor": {},
                "count": 1,
                "before": 0,
            }
            await db.execute(UPSERT_WITH_FENCE, {**values, "finished": False, "at": clock.now()})
        await db.commit()


async def _send_what_the_watch_sends(plans: Plans, ledger: Database, application: Database) -> None:
    now, later = clock.now(), timedelta(minutes=5)
    await _fill_tally(ledger, now, 3_000)
    watched = make_task("watched", "* * * * *", expect_every=1, deadline=timedelta(seconds=30))
    await know(ledger, watched)
    failed = [new("watched", state="failed", finished_at=now) for _ in range(3)]
    checks = Checks(
        ledger, application, Thresholds(late_after=0.001, least_slow=0.001), lambda _: ["all/1"]
    )
    async with ledger.engine.begin() as connection:
        seen = await watched_tasks(connection)
        await runs.insert(connection, failed)
        with plans.of("notice"):
            await noticing.notice_runs(connection, now)
            await noticing.notice_ranges(connection, Outage(), now)
            await noticing.notice_nodes(connection, now + later, later)
            await noticing.notice_backups(connection, now)
            await duties.hold(connection, duties.WATCH, NODE)
        with plans.of("check"):
            findings = await checks.look(connection, seen, [failed[0].id], now + later)
            await checks.write(connection, findings, now + later)
            await telling.repeat(
                connection, findings.watched, lambda _: ["all/1"], later, now + 2 * later
            )
        with plans.of("send"):
            rows = await outbox.take(connection, "all/1", now + 3 * later)
            await outbox.failed(connection, rows, "no", now)
            await outbox.sent(
                connection, await outbox.take(connection, "all/1", now + 3 * later), now
            )
            await outbox.next_due(connection)
        with plans.of("incidents"):
            (opened, *_) = await incidents.are_open(connection)
            for conditions in (
                {},
                {"is_open": True},
                {"before": (now, new_id())},
                {"closed_since": now},
            ):
                await connection.execute(incidents.listing(10, **conditions))
            for kind in (None, "failed"):
                await incidents.number_closed(connection, incidents.Like(kind), 10)
            await incidents.opened_since(connection, now, incidents.ANY, 10)
            await acknowledging.acknowledge(connection, opened.id, "ann", "seen", now + later, now)
            await acknowledging.undo(connection, opened.id, now)
            await incidents.prune(connection, now - timedelta(days=400))
            await outbox.prune(connection, now - timedelta(days=400))
    async with ledger.engine.begin() as connection:
        with plans.of("tally"):
            wanted = buckets.between(now - 6 * later, now)
            await tally.of_window(connection, now - 6 * later, now, now)
            await tally.keep(connection, wanted, now)
            await buckets.dirty(connection, 10)
            await tally.unaccounted(connection, ["watched"])
        with plans.of("night"):
            await night_late.late_runs(connection, [], now + later)
            in_need = await night_needs.in_need(connection, Counter())
            owners = await answering(connection, in_need.tasks)
            await night_needs.of_runs(connection, in_need, owners, frozenset())
            await previews.begun(connection, "retry", now, 10)
            await night_needs.dealt_with(connection, now - later, now, frozenset())
            not_run = {"watched": Counter(missed=1, skipped=1)}
            await did_not_run.by_cause(connection, not_run, now - later, now, frozenset())
            for is_left in (True, False):
                unchosen = missed_ranges.unchosen(
                    ["watched"], now - later, now, ledger.kind, is_left=is_left
                )
                await connection.execute(unchosen)
            await missed_ranges.leave(connection, [new_id()], "ann", "seen", now)
            failed_slots = SlotCounts(
                due=1, recounted_until=now, **{**dict.fromkeys(CLASSES, 0), "failed": 1}
            )
            await night_reading.failed_slots(connection, failed_slots, now - later, now)
            await night_reading.beside(connection, now - later, now)
            await schedules.in_use(connection)
            await nodes.pings(connection)
        with plans.of("forecast"):
            await _ask_for_a_forecast(connection, seen)
    with plans.of("night"):
        await Operations(ledger, application, Loaded, Settings())(ShowStatus())
    with plans.of("history"):
        for name in ("over-1", "many-1"):
            context = Operations(ledger, application, Loaded, Settings()).context
            await history.history(context, name, "UTC")
            await history.last_days(context, name, "UTC")
    asked = Operations(ledger, application, Loaded, Settings())
    incident = (await asked(ListIncidents(state="all", limit=1))).incidents[0].id
    with plans.of("why"):
        await rooms.room(asked.context, incident)
        await asked(WhyTask(name="over-1"))
        failed = (await asked(ListRuns(state=[RunState.FAILED], limit=1))).runs
        await asked(WhyRun(run=failed[0].id))
    with plans.of("overview"):
        await overview.overview(
            Operations(ledger, application, Loaded, Settings()).context, "all", "", 0
        )


async def _ask_for_a_forecast(connection: AsyncConnection, seen: dict[str, WatchedTask]) -> None:
    """Of slots that have runs, and with no free place."""
    now = clock.now()
    asked = await promises.read(connection, seen.values(), now - timedelta(hours=1), now)
    assert asked.promises
    await promises._awaited(connection, [new_id()])
    await promises._with_rooms(connection, asked.facts, {"default"})


async def _send_what_people_send(plans: Plans, ledger: Database) -> None:
    async with ledger.engine.begin() as connection:
        with plans.of("list"):
            at = clock.now()
            few, all_states = frozenset({"failed", "queued"}), frozenset(RunState)
            for conditions in (
                *(
                    {},
                    {"task": "over-1"},
                    {"states": few},
                    {"states": all_states},
                    {"created_since": at},
                ),
                *(
                    {"task": "over-1", "states": few, "text": "x", "params": {"a": "1"}},
                    {"node": NODE, "text": "x"},
                ),
                {"task": "over-1", "by_slot": True},
            ):
                await run_query.page(connection, run_query.RunQuery(**conditions), 10)
                await run_query.page(
                    connection, run_query.RunQuery(**conditions), 10, (at, new_id())
                )
        for name, conditions in (
            ("list of an error", {"task": "over-1", "fingerprint": "1:0"}),
            ("list of an error", {"task": "over-1", "fingerprint": "1:0", "states": few}),
            ("list of parts", {"origins": frozenset({"part"})}),
            ("list of parts", {"origins": frozenset({"part"}), "states": few, "task": "over-1"}),
            ("list of parts and runs", {"origins": frozenset({"part", "manual"})}),
            (
                "list of parts and runs",
                {"origins": frozenset({"part", "manual"}), "task": "over-1"},
            ),
            ("list of named runs", {"ids": frozenset({new_id(), new_id()}), "states": few}),
            ("list of the parts of a run", {"parent": new_id()}),
            ("list of the parts of a run", {"parent": new_id(), "states": few}),
        ):
            with plans.of(name):
                await run_query.page(connection, run_query.RunQuery(**conditions), 10)
                await run_query.page(
                    connection, run_query.RunQuery(**conditions), 10, (at, new_id())
                )
        for name, conditions in (
            ("count", {}),
            ("count", {"created_since": at}),
            ("count of a task", {"task": "over-1"}),
            ("count of a task", {"task": "over-1", "created_since": at, "created_until": at}),
            ("count of an error", {"task": "over-1", "fingerprint": "1:0"}),
            ("count of the parts of a run", {"parent": new_id()}),
        ):
            with plans.of(name):
                await run_query.counts(connection, run_query.RunQuery(**conditions))
        context = Operations(ledger, ledger, Loaded, Settings(), actor=Actor("ann")).context
        with plans.of("search"):
            await finding.find_tasks(connection, ["over-1", "x"], 20)
            await finding.find_incidents(connection)
            for conditions in (
                {"task": "over-1"},
                {"task": "over-1", "state": ["failed"]},
                {"state": ["failed", "retrying"], "text": "x", "created_since": at},
                {"param": ["a=1"], "created_since": at},
            ):
                wanted = RunFilter.of(**conditions)
                await finding.number_of(connection, context, wanted)
                await finding.newest_of(connection, context, wanted, 10)
        with plans.of("a run by the end of its id"):
            await run_ids.end_in(connection, "0000", 2)
        with plans.of("show"):
            run = await runs.latest(connection, "over-1")
            assert run is not None
            await runs.get(connection, run)
            await run_ids.begin_with(connection, "0000", 2)
            await attempts.of_run(connection, run)
            await missed_ranges.of_task(connection, "over-1", 3)
            await phases.children(connection, run)
        with plans.of("cancel"):
            await cancel.request_cancel(connection, run, "cancelled by ann", "ann")
        with plans.of("start"):
            await enqueue.enqueue(
                connection,
                enqueue.Startable.of(make_task("many-2", None)),
                None,
                None,
                "ann",
                key="a",
            )
            await enqueue.enqueue(
                connection,
                enqueue.Startable.of(make_task("many-3", None)),
                None,
                None,
                "ann",
                key="a",
            )
        with plans.of("audit"):
            at = clock.now()
            for conditions in (
                {},
                {"task": "over-1"},
                {"action": "run.retry"},
                {"before": (at, new_id())},
            ):
                await connection.execute(audit.listing(10, **conditions))
                await connection.execute(audit.numbers(10, **conditions))
            await audit.record(
                connection, audit.By("ann"), "run.retry", at, task="over-1", key="once"
            )
        with plans.of("bulk"):
            await previews.under_way(connection)
            await previews.move(connection, new_id(), 0, to=1, changed=1, finished_at=None)
            await duties.take(connection, "bulk", NODE, at, 30)
        with plans.of("session"):
            await connection.execute(access.token("key", at))
            await connection.execute(access.session("id", at))
        with plans.of("pause"):
            await pauses.pause(connection, "many-4", "ann")
            await pauses.resume(connection, "many-4")
        with plans.of("schedules of a task"):
            await schedules.history(connection, "many-5")


async def _node(ledger: Database) -> str:
    row = {
        "id": new_id(),
        "host": "elsewhere",
        "pid": 1,
        "version": "1",
        "draining": False,
        "tasks": [],
    }
    async with ledger.engine.begin() as connection:
        await connection.execute(
            tables.nodes.insert().values(**row, started_at=clock.now(), seen_at=clock.now())
        )
    return str(row["id"])


async def _fill(ledger: Database, application: Database) -> dict[str, Task]:
    """Fill the ledger: many other rows; four tasks of this node, each with a due slot, a missed
    slot and a run.
    """
    ruled = {"free": "allow", "waits": "wait"}
    loaded = await know(
        ledger,
        make_task("plain", "* * * * *"),
        *(make_task(name, "* * * * *", overlap=overlap) for name, overlap in ruled.items()),
        make_task("lanes", "* * * * *", max_running=2),
    )
    await crowd(ledger, RUNS, tasks=2_000, nodes=20, analyze=False)
    ended = {
        "host": "here",
        "pid": 1,
        "version": "1",
        "draining": True,
        "tasks": [],
        "fires": False,
    }
    now, later = clock.now(), timedelta(minutes=5)
    instants = dict.fromkeys(("started_at", "seen_at", "stopped_at", "noticed_at"), now)
    stopped = [{"id": new_id(), **ended, **instants} for _ in range(3_000)]
    gaps = {"count": 1, "reason": "the service was down", "created_at": now}
    long_ago = now - timedelta(days=40)
    gaps |= {"first_slot": long_ago, "last_slot": long_ago}
    missed = [{"id": new_id(), "task": f"over-{n % 10}", **gaps} for n in range(len(stopped))]
    held = {"state": "running", "attempt": 1, "attempt_started_at": now, "exclusive": None}
    # Of few tasks: the watch asks for the usual duration of each task with a run.
    held_by = [each["id"] for each in stopped[:50]]
    running = [new(f"many-{n % 100}", node=held_by[n % 50], **held) for n in range(len(stopped))]
    async with ledger.engine.begin() as connection:
        await connection.execute(tables.nodes.insert(), stopped)
        await connection.execute(tables.missed.insert(), missed)
        await connection.execute(
            update(tables.schedules)
            .where(tables.schedules.c.task.in_(loaded))
            .values(fired_until=now - later)
        )
        await runs.insert(connection, running)
        await runs.insert(
            connection, [new(name, exclusive=task.exclusive) for name, task in loaded.items()]
        )
        waited = [
            {"run": new_id(), "task": f"over-{n % 10}", "slot": long_ago}
            for n in range(len(stopped))
        ]
        await connection.execute(waits.waits.insert(), waited)
        await _fill_requests(connection, now, len(stopped))
        await _fill_incidents(connection, now, len(stopped))
    async with application.engine.begin() as connection:
        fences = [{"run": new_id(), "name": "", "fence": 1} for _ in stopped]
        await connection.execute(companions.checkpoints.insert(), fences)
        await connection.execute(
            companions.once.insert(),
            [{"key": new_id(), "run": new_id(), "at": now} for _ in stopped],
        )
        aside = {"item": "1", "error": {}, "times": 1, "at": now, "task": "over-1"}
        await connection.execute(
            companions.quarantine.insert(),
            [{"id": new_id(), "run": new_id(), **aside} for _ in stopped],
        )
        await connection.execute(
            insert(User), [{"email": f"{n}@example.org"} for n in range(len(stopped))]
        )
    for database in (ledger, application):
        if database.kind == "postgresql":
            async with database.engine.begin() as connection:
                await connection.execute(text("ANALYZE"))
    return loaded


async def _fill_requests(connection: AsyncConnection, now: datetime, number: int) -> None:
    """Events, previews, sessions and tokens: `number` of each, all from now on."""
    later, by = now + timedelta(days=1), {"actor": "ann", "source": "api"}
    for n in range(number // 1_000):
        rows = range(n * 1_000, (n + 1) * 1_000)
        events = [
            {"id": new_id(), "at": now, **by, "action": f"act.{n}", "task": f"over-{n % 10}"}
            for n in rows
        ]
        await connection.execute(access_tables.events.insert(), events)
        shown = {
            "action": "retry",
            "actor": "ann",
            "request": {},
            "created_at": now,
            "expires_at": later,
        }
        ended = {"started_at": now, "finished_at": now}
        await connection.execute(
            access_tables.previews.insert(), [{"id": new_id(), **shown, **ended} for _ in rows]
        )
        person = {"name": "ann", "role": "viewer", "created_at": now, "expires_at": later}
        sessions = [{"id": f"s{n}", "token": f"t{n}", **person} for n in rows]
        await connection.execute(access_tables.sessions.insert(), sessions)
        windows = [
            {"task": "over-1", "kind": "once_in", "key": f"{n}", "run": new_id(), "until": later}
            for n in rows
        ]
        await connection.execute(merges.merges.insert(), windows)
        await connection.execute(
            merges.merged.insert(), [{"id": new_id(), "at": later} for _ in rows]
        )
        made = {
            "kind": "token",
            "role": "viewer",
            "hash": "x",
            "created_at": now,
            "created_by": "ann",
        }
        await connection.execute(
            access_tables.tokens.insert(), [{"id": f"t{n}", "name": f"t{n}", **made} for n in rows]
        )


async def _fill_incidents(connection: AsyncConnection, now: datetime, number: int) -> None:
    """Incidents that are over, and messages that were sent: `number` of each."""
    ago = [now - timedelta(minutes=10 * n) for n in range(1, number + 1)]
    over = {
        "kind": "failed",
        "text": "boom",
        "closed_at": now,
        "closed_why": "made_good",
        "told_at": now,
    }
    rows = [
        {"id": new_id(), "task": f"over-{n % 10}", "opened_at": at, "last_at": at}
        for n, at in enumerate(ago)
    ]
    await connection.execute(incident_tables.incidents.insert(), [{**row, **over} for row in rows])
    sent = {"channel": "all/1", "kind": "opened", "content": {}, "sent_at": now}
    await connection.execute(
        incident_tables.outbox.insert(),
        [{"id": new_id(), "created_at": at, "due_at": at, **sent} for at in ago],
    )
    seen = {"first_seen_at": now, "error": "boom"}
    await connection.execute(
        incident_tables.fingerprints.insert(),
        [{"task": f"over-{n}", "fingerprint": "1:boom", **seen} for n in range(number)],
    )
    took = {"runs": 1, "computed_at": now}
    await connection.execute(
        tables.durations.insert(), [{"task": f"over-{n}", **took} for n in range(number)]
    )
    good = {"fingerprint": "1:boom", "noticed_at": now, "made_good_at": now}
    bad = [new(f"over-{n % 10}", state="failed", finished_at=now) for n in range(number)]
    await runs.insert(connection, bad)
    await connection.execute(
        update(tables.runs).where(tables.runs.c.state == "failed").values(good)
    )


async def _fill_tally(ledger: Database, now: datetime, number: int) -> None:
    """So many buckets that were counted."""
    at = [buckets.bucket_of(now - timedelta(days=2, minutes=10 * n)) for n in range(number)]
    counts = dict.fromkeys(buckets.CLASSES, 0)
    async with ledger.engine.begin() as connection:
        await connection.execute(
            buckets.buckets.insert(), [{"bucket": one, "counted_at": now} for one in at]
        )
        rows = [{"bucket": one, "task": "over-1", **counts} for one in at]
        await connection.execute(buckets.tally.insert(), rows)
    if ledger.kind == "postgresql":
        async with ledger.engine.begin() as connection:
            await connection.execute(text("ANALYZE batch_buckets, batch_tally"))


Found = dict[str, list[tuple[str, list[str]]]]


def used(plans: Found, name: str) -> set[str]:
    """The indexes that the plans of these statements name."""
    lines = "\n".join(line for _, plan in plans[name] for line in plan)
    return set(re.findall(r"\b((?:ix|uq)_batch_\w+)", lines)) - {"ix_batch_once_run"}


def scanned(name: str, statement: str, plan: list[str]) -> list[str]:
    """The lines of a plan that scan a large table. PostgreSQL names the table, SQLite its alias."""
    large = {"batch_runs"} if name in ONCE_AN_HOUR else LARGE
    aliases = re.findall(rf"\b(?:{'|'.join(large)})(?: AS)? ([a-z]\w*)", statement)
    through = [(line, re.search(r"Seq Scan on (\w+)|^SCAN (\w+)", line)) for line in plan]
    lines = [
        line for line, found in through if found and (found[1] or found[2]) in {*large, *aliases}
    ]
    return [line for line in lines if name not in IN_ORDER or not re.search(IN_ORDER[name], line)]


def test_no_statement_scans_a_large_table(plans: Found) -> None:
    wrong = [
        f"{name}: {statement}: {line}"
        for name, statements in plans.items()
        for statement, plan in statements
        for line in scanned(name, statement, plan)
    ]
    assert wrong == []


def test_the_check_finds_a_scan() -> None:
    statement = "SELECT q.id FROM batch_runs q, batch_tasks"
    wrong = ["SCAN q", "  ->  Seq Scan on batch_tasks t"]
    assert scanned("fire", statement, [*wrong, "SEARCH q USING INDEX x", "SCAN json_each"]) == wrong


@pytest.mark.parametrize("name", PLANS)
def test_runs_are_found_by_the_indexes_meant_for_that(plans: Found, name: str) -> None:
    assert PLANS[name] <= used(plans, name) <= PLANS[name] | BY_KIND.get(name, set()) | HARMLESS


async def test_only_the_first_runs_of_a_queue_are_read(ledger: Database) -> None:
    """A bitmap scan of PostgreSQL would read all of them. SQLite has none, and would sort in a
    temporary B-tree.
    """
    loaded = await know(ledger, *(make_task(f"free-{n}", None, overlap="allow") for n in range(10)))
    plans = Plans(ledger)
    async with ledger.engine.begin() as connection:
        await runs.insert(
            connection, [new(name, exclusive=None) for _ in range(2_000) for name in loaded]
        )
        if ledger.kind == "postgresql":
            await connection.execute(text("ANALYZE batch_runs"))
        with plans.of("claim"):
            now, found = await claiming.startable(
                connection, loaded, Capacity(100, 100), locks=True
            )
            await claiming.heads(connection, [*loaded], now or clock.now(), 100, retries=True)
    assert len(found) == 100
    heads = [plan for statement, plan in (await plans.read())["claim"] if " AS heads" in statement]
    assert len(heads) == 2
    lines = [line for plan in heads for line in plan]
    assert [line for line in lines if "Bitmap" in line or "batch_runs_waiting" in line] == []
    assert any("ix_batch_runs_queue" in line for line in lines)


async def test_outcomes_are_joined_by_ids_although_no_run_was_running_when_statistics_were_made(
    ledger: Database,
) -> None:
    """PostgreSQL would expect one such run, and compare each row of the table with each outcome."""
    await know(ledger, make_task("many", None, overlap="allow"))
    over = [
        new("many", exclusive=None, state="succeeded", finished_at=clock.now())
        for _ in range(1_000)
    ]
    held = {
        "state": "running",
        "node": NODE,
        "attempt": 1,
        "attempt_started_at": clock.now(),
        "exclusive": None,
    }
    running = [new("many", **held) for _ in range(3_000)]
    plans = Plans(ledger)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, over)
        if ledger.kind == "postgresql":
            await connection.execute(text("ANALYZE batch_runs"))
        await runs.insert(connection, running)
        ends = (RunState.SUCCEEDED, "succeeded", 1, NODE, "many", clock.now())
        outcomes = [Outcome(run.id, run.fence, *ends, ended_at=clock.now()) for run in running]
        progress = {
            "count": 1,
            "total": None,
            "count_before": 0,
            "message": "",
            "progress_at": None,
            "rate": 1.0,
        }
        with plans.of("write"):
            await attempts.write_progress(
                connection, [{"id": run.id, "fence": run.fence, **progress} for run in running]
            )
            assert await transitions.finish(connection, outcomes) == []
    joined = [
        plan
        for statement, plan in (await plans.read())["write"]
        if statement.startswith("UPDATE batch_runs")
    ]
    assert len(joined) == 2
    by_id = (
        "Hash Cond: ((batch_runs.id = v.id)",
        "Index Cond: (id = v.id)",
        "SEARCH batch_runs USING INDEX sqlite_auto",
    )
    for plan in joined:
        assert any(line.strip().startswith(by_id) for line in plan), plan


def test_every_index_serves_a_statement(plans: Found) -> None:
    serving = {index for name in plans for index in used(plans, name)}
    indexes = {index for table in tables.ledger.tables.values() for index in table.indexes}
    assert {str(index.name) for index in indexes if not index.unique} - serving == set()
