"""The tally of slots: after any history its sums are those of `batch account`, slot by slot."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, insert, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.account.account import SLOTS, AccountedSlot, accounts
from batch_system.batch.account.slots import Kind
from batch_system.batch.firing.backfill import Backfill
from batch_system.batch.ledger import buckets, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.buckets import bucket_of
from batch_system.batch.ledger.buckets import buckets as buckets_table
from batch_system.batch.ledger.states import ACTIVE, Origin, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.night import counting, tally, task_tally
from batch_system.batch.queue.enqueue import Startable
from batch_system.config import Settings
from batch_system.database.engine import Database
from batch_system.operations.asking.context import Loaded
from batch_system.operations.night import unaccounted
from batch_system.operations.operations import Operations
from batch_system.operations.tasks import history
from tests.batch.ledger_world import NODE, know, make_task, rows
from tests.batch.test_account import Story
from tests.batch.test_runs import insert as insert_runs
from tests.batch.test_runs import new
from tests.kinds import KINDS

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
NOT_YET = ("active", "unaccounted")


async def by_account(ledger: Database, since: datetime, until: datetime) -> Counter[str]:
    """The slots of the window by class, as `batch account` has them."""
    counted: Counter[str] = Counter()
    now = clock.now()
    paused = [
        (row["task"], row["first_slot"], row["last_slot"])
        for row in await rows(ledger, tables.missed)
        if row["cause"] == "paused"
    ]

    def see(slot: AccountedSlot) -> None:
        if slot.kind not in SLOTS or not since <= slot.slot < until:
            return
        if slot.state is not None:
            counted["active" if slot.state in ACTIVE else slot.state] += 1
        elif slot.kind == Kind.MISSED:
            is_paused = any(
                task == slot.task and first <= slot.slot <= last for task, first, last in paused
            )
            counted["paused" if is_paused else "missed"] += 1
        else:
            is_new = slot.kind in (Kind.DUE, Kind.LATE) and slot.slot > now - MINUTE
            counted["active" if is_new else "unaccounted"] += 1

    async with ledger.reader.connect() as connection:
        async for _ in accounts(connection, since, until, see=see):
            pass
    return counted


async def by_tally(ledger: Database, since: datetime, until: datetime) -> Counter[str]:
    async with ledger.reader.connect() as connection:
        window = await tally.of_window(connection, since, until, clock.now())
    assert window.due == sum(window.counts.values())
    return +Counter(window.counts)


class Night(Story):
    """A history in which buckets are counted meanwhile, and people retry and backfill slots that
    ended long ago.
    """

    async def tell(self, events: int) -> None:
        self.happenings = (
            self.ends,
            self.ends,
            self.counts,
            self.counts,
            self.retries,
            self.backfills,
        )
        await know(self.ledger, self.task)
        for _ in range(events):
            await self.happens()
            if self.chance.random() < 0.7:
                await self.chance.choice(self.happenings)()

    async def happens(self) -> None:
        clock.advance(self.chance.choice([1, 3, 10, 40]) * MINUTE)
        await self.chance.choice(
            [self.fires, self.fires, self.fires, self.pauses, self.changes, self.goes]
        )()

    async def ends(self) -> None:
        """Some active runs end."""
        active = [row for row in await rows(self.ledger) if row["state"] in ACTIVE]
        for row in self.chance.sample(active, len(active) * 2 // 3):
            with suppress(IntegrityError):  # another run of the task is running
                async with self.ledger.engine.begin() as connection:
                    if row["state"] != RunState.RUNNING:
                        await transitions.claim(connection, [row["id"]], NODE, clock.now())
            (now,) = await rows(self.ledger, id=row["id"])
            if now["state"] == RunState.RUNNING:
                await self._end(
                    now["id"],
                    now["fence"],
                    self.chance.choice([RunState.SUCCEEDED, RunState.FAILED]),
                )

    async def _end(self, run: str, fence: int, state: RunState) -> None:
        now = clock.now()
        outcome = Outcome(run, fence, state, state.value, 1, NODE, "tick", now, now)
        async with self.ledger.engine.begin() as connection:
            await transitions.finish(connection, [outcome])

    async def counts(self) -> None:
        """Some buckets that may be over are counted for good."""
        wanted = buckets.between(START, tally.may_be_over(clock.now()))
        chosen = self.chance.sample(wanted, min(len(wanted), 20))
        async with self.ledger.engine.begin() as connection:
            await tally.keep(connection, sorted(chosen), clock.now())

    async def retries(self) -> None:
        failed = [
            row["id"] for row in await rows(self.ledger) if row["state"] in ("failed", "skipped")
        ]
        async with self.ledger.engine.begin() as connection:
            await transitions.reopen(connection, failed[:3], Rank.MANUAL, "ann", clock.now())

    async def backfills(self) -> None:
        slots = sorted({row["first_slot"] for row in await rows(self.ledger, tables.missed)})
        fill = Backfill(self.ledger, self.ledger, Startable.of(self.task), "ann")
        if chosen := slots[:3]:
            await fill._make(await fill._decide(chosen), after=None)


def seeds(number: int) -> pytest.MarkDecorator:
    """This number of histories on each kind of database, and four times as many in `make
    nightly`.
    """
    cases = [
        pytest.param(kind, seed, marks=[pytest.mark.nightly] if seed >= number else [])
        for seed in range(4 * number)
        for kind in KINDS
    ]
    return pytest.mark.parametrize(("ledger_url", "seed"), cases, indirect=["ledger_url"])


@pytest.mark.rest
@seeds(2)
async def test_after_any_history_the_sums_are_those_of_the_account(
    ledger: Database, seed: int
) -> None:
    chance = random.Random(seed)
    with clock.moved(START):
        await Night(ledger, seed).tell(40)
        for _ in range(6):
            since = bucket_of(START + chance.randint(0, 300) * MINUTE)
            until = min(clock.now(), since + chance.choice([7, 60, 600]) * MINUTE)
            assert await by_tally(ledger, since, until) == await by_account(ledger, since, until)


@pytest.mark.rest
@seeds(2)
async def test_after_any_history_the_days_of_a_task_are_those_of_the_account(
    ledger: Database, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are counted from the runs, or read from the tally where there is one."""

    async def too_many(_: Any, __: str, pieces: Any, intervals: Any, ___: int) -> Any:
        is_all = [each[0] for each in intervals] == [pieces[0].begin]
        return [] if is_all else intervals

    def of_days(counts: Counter[str]) -> dict[str, int]:
        return {name: counts[name] for name in buckets.CLASSES if name not in NOT_YET}

    with clock.moved(START):
        await Night(ledger, seed).tell(40)
        context = Operations(ledger, ledger, Loaded, Settings()).context
        by_account_ = await by_account(ledger, START - timedelta(days=1), clock.now() + SECOND)
        found = await history.history(context, "tick", "UTC")
        assert of_days(Counter(found.counts)) == of_days(by_account_)
        monkeypatch.setattr(task_tally, "known", too_many)
        again = await history.history(context, "tick", "UTC")
        assert of_days(Counter(again.counts)) == of_days(by_account_)
        if found.zone != "Asia/Kathmandu":  # where a bucket may lie in two days
            assert [of_days(Counter(day.counts)) for day in again.days] == [
                of_days(Counter(day.counts)) for day in found.days
            ]


async def test_no_day_of_which_only_a_part_was_counted_is_shown(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task("hourly", "0 * * * *")
    with clock.moved(START):
        await know(ledger, task)
        slots = [START.replace(minute=0, second=0) - n * 60 * MINUTE for n in range(100)]
        made = [
            new("hourly", slot=slot, origin=Origin.SCHEDULE, state=RunState.SUCCEEDED)
            for slot in slots
        ]
        await insert_runs(ledger, *made)
        context = Operations(ledger, ledger, Loaded, Settings()).context
        whole = await history.history(context, "hourly", "UTC")
        assert whole.counts == {"succeeded": 100}
        monkeypatch.setattr(history, "MOST_RUNS", 40)
        monkeypatch.setattr(history, "MOST_BESIDE_TALLY", 40)
        some = await history.history(context, "hourly", "UTC")
        assert [day.counts for day in some.days if day.counts] == [
            *({"succeeded": 24}, {"succeeded": 13})
        ]
        assert some.known_from == START.date() - timedelta(days=1)


@seeds(1)
async def test_after_any_history_the_list_has_the_unaccounted_slots_of_the_account(
    ledger: Database, seed: int
) -> None:
    chance = random.Random(seed)
    with clock.moved(START):
        story = Night(ledger, seed)
        await story.tell(30)
        lost = [row["id"] for row in await rows(ledger) if chance.random() < 0.2]
        async with ledger.engine.begin() as connection:  # an error of this code
            for run in lost:
                await connection.execute(delete(tables.runs).where(tables.runs.c.id == run))
            await connection.execute(update(buckets_table).values(counted_at=None))
        await story.counts()
        clock.advance(5 * MINUTE)
        for _ in range(4):
            since = bucket_of(START + chance.randint(0, 300) * MINUTE)
            until = min(clock.now(), since + chance.choice([7, 60, 600]) * MINUTE)
            for most in (3, 10_000):
                expected = await unaccounted_by_account(ledger, since, until)
                async with ledger.reader.connect() as connection:
                    found = await unaccounted.of_window(
                        connection, since, until, clock.now(), 30, most
                    )
                assert ([tuple(each) for each in found.slots], found.number) == (
                    expected[:most],
                    len(expected),
                )


async def unaccounted_by_account(
    ledger: Database, since: datetime, until: datetime
) -> list[tuple[str, datetime, Kind]]:
    """The slots of the window that `batch account` finds due for more than a minute, late or lost;
    the newest first.
    """
    found: list[AccountedSlot] = []
    async with ledger.reader.connect() as connection:
        async for _ in accounts(connection, since, until, see=found.append):
            pass
    old = clock.now() - MINUTE
    return [
        (each.task, each.slot, each.kind)
        for each in reversed(found)
        if since <= each.slot < until
        and (each.kind == Kind.GAP or (each.kind in (Kind.DUE, Kind.LATE) and each.slot <= old))
    ]


async def test_the_list_says_which_slots_are_late_and_which_were_lost(ledger: Database) -> None:
    with clock.moved(START):
        await know(ledger, make_task("tick", "* * * * *"), make_task("unserved", "* * * * *"))
        clock.advance(5 * MINUTE)
        now = clock.now()
        node = {
            "id": new_id(),
            "host": "h",
            "pid": 1,
            "version": "1",
            "draining": False,
            "tasks": ["tick"],
        }
        async with ledger.engine.begin() as connection:
            await connection.execute(
                insert(tables.nodes).values(**node, started_at=now, seen_at=now)
            )
            await connection.execute(update(tables.schedules).values(fired_until=now - 3 * MINUTE))
        async with ledger.reader.connect() as connection:
            found = await unaccounted.of_window(connection, bucket_of(START), now, now, 30, 200)
    by_task = {
        task: [str(each.kind) for each in found.slots if each.task == task]
        for task in ("tick", "unserved")
    }
    assert by_task == {
        "tick": ["late", "late", "gap", "gap"],
        "unserved": ["due", "due", "gap", "gap"],
    }


async def test_a_list_of_unaccounted_slots_counts_no_more_buckets_than_night_does(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[timedelta] = []

    async def count(
        connection: AsyncConnection, since: datetime, until: datetime, *more: Any
    ) -> Any:
        counted.append(until - since)
        return await counting.count(connection, since, until, *more)

    with clock.moved(START):
        await know(ledger, make_task("tick", "*/10 * * * *"))
        until = bucket_of(START + timedelta(days=20))
        clock.advance(timedelta(days=21))
        # A service has handled all slots, and has recorded nothing.
        async with ledger.engine.begin() as connection:
            await connection.execute(update(tables.schedules).values(fired_until=clock.now()))
            await tally.keep(connection, buckets.between(START, until), clock.now())
        monkeypatch.setattr(unaccounted, "count", count)
        async with ledger.reader.connect() as connection:
            found = await unaccounted.of_window(
                connection, bucket_of(START), clock.now(), clock.now(), 30, 200
            )
    assert len(found.slots) == 200 and found.number == 21 * 144 and found.accounted_from is None
    assert sum(counted, timedelta()) <= tally.MOST_COUNTED_AT_ONCE * buckets.LENGTH
    assert len(counted) <= 201


async def test_the_sums_of_a_bucket_are_kept_until_it_is_counted_anew(ledger: Database) -> None:
    now = clock.now()
    young, old = bucket_of(now - timedelta(hours=2)), bucket_of(now - timedelta(hours=30))
    none, some = dict.fromkeys(buckets.CLASSES, 0), (young, old)

    async def keep(number: int, *counted: datetime) -> None:
        """As if these buckets of the last hours had so many slots that went well."""
        async with ledger.engine.begin() as connection:
            await buckets.lock(connection, counted, clock.now())
            await connection.execute(delete(buckets.tally))
            rows = [{**none, "bucket": at, "task": "load", "succeeded": number} for at in some]
            await connection.execute(insert(buckets.tally), rows)

    since = bucket_of(now - timedelta(hours=31))
    await keep(3, *some)
    assert await by_tally(ledger, since, now) == {"succeeded": 6}
    await keep(5, young)
    assert await by_tally(ledger, since, now) == {"succeeded": 10}
    await keep(7)  # as pruning does, but only in buckets that are older than a day
    assert await by_tally(ledger, since, now) == {"succeeded": 5 + 7}
    async with ledger.engine.begin() as connection:
        await buckets.slots_have_changed(connection, [young], now)
    assert await by_tally(ledger, since, now) == {"succeeded": 7}  # there is no such schedule
    await keep(8, young)
    assert await by_tally(ledger, since, now) == {"succeeded": 16}
