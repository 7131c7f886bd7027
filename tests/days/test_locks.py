"""Somebody's transaction on PostgreSQL is open for two minutes, and holds locks that the service
needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer
from tests.days.story import MISSED, TWELVE, Story, down

pytestmark = pytest.mark.days

HELD_SECONDS = 120


@pytest.fixture
def story(server: OwnServer, tmp_path: Path) -> Iterator[Story]:
    slow = 'name, schedule, alerts = "long", "*/10 * * * * *", Alerts(slow_after=60)'
    tasks = TWELVE.replace('name, schedule = "long", "*/10 * * * * *"', slow)
    with Story(
        tmp_path / "story", {"DATABASE_URL": wait_for(server.create_database())}, tasks
    ) as story:
        story.start("a", "b")
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        yield story


@contextmanager
def transaction(story: Story, statement: str) -> Iterator[int]:
    """Somebody's transaction that has executed this, in a client called `psql`, and the number of
    its process.
    """
    url = make_url(story.settings["DATABASE_URL"])
    where = (
        f"host={url.query['host']} port={url.query['port']} user={url.username} "
        f"dbname={url.database}"
    )
    with psycopg.connect(f"{where} application_name=psql") as connection:
        connection.execute(statement)
        yield connection.info.backend_pid


def test_a_row_of_a_run_is_locked(story: Story) -> None:
    """Its node can't write how the run ended; everything else goes on, and it is said who holds the
    lock.
    """
    one = "SELECT id FROM batch_runs WHERE task = 'long' ORDER BY created_at DESC LIMIT 1"
    story.until(lambda: story.is_running("long"), 15, "a run of `long` goes on")
    locking = f"UPDATE batch_runs SET reason = 'mine' WHERE id = ({one})"
    with transaction(story, locking) as pid:
        story.wait(60)
        others = {"tick", *(f"short{number}" for number in range(10))}
        since = story.now()
        story.until(lambda: story.ended_since(since) >= others, 15, "the others fire")
        said = [reasons for node in story.nodes.values() if (reasons := node.readiness())]
        assert len(said) == 1
        assert re.search(
            rf"a run has ended, .* locked by pid {pid} \(psql, role postgres\), idle in "
            r"transaction",
            said[0]["ledger"],
        )
        story.wait(HELD_SECONDS - 60)
    story.check_end()
    slow = (
        "slow long: the ledger can't be told how it goes on, since its row is locked by pid N "
        "(psql, role postgres), "
        "idle in transaction for SOME TIME: UPDATE batch_runs SET reason = … "
        "WHERE id = (SELECT id FROM batch_runs "
        "WHERE task = … ORDER BY created_at DESC LIMIT 1); end that transaction"
    )
    story.check_told(f"opened {slow}", f"closed {slow}")


def test_a_row_of_a_schedule_is_locked(story: Story) -> None:
    """Its task is not fired meanwhile, which is an incident within a minute that says who holds the
    lock.
    """
    with transaction(
        story, "UPDATE batch_schedules SET fired_until = fired_until WHERE task = 'short3'"
    ) as pid:
        story.until(
            lambda: any("opened unfired" in message for message in story.messages),
            75,
            "the incident",
        )
        (told,) = [message for message in story.messages if "opened unfired" in message]
        assert re.search(
            rf"slots of short3 have not fired since .* schedules are locked by pid {pid} \(psql",
            told,
        ), told
        for node in story.nodes.values():
            story.until(
                lambda node=node: "firing" in (node.readiness() or {}),
                15,
                f"{node.name} says so too",
            )
        assert "short3" in story.batch("status", code=1)
        story.wait(45)
    story.check_end()
    held = (
        "by pid N (psql, role postgres), idle in transaction for SOME TIME: UPDATE "
        "batch_schedules SET "
        "fired_until = fired_until WHERE task = …"
    )
    story.check_told(
        "opened unfired : a service lives, but slots of short3 have not fired since TIME UTC: "
        f"their schedules are locked {held}; end that transaction",
        "closed unfired : a service lived, but slots were not fired, from TIME to TIME UTC (SOME "
        f"TIME): their schedules were locked {held}. N slots of short3 did not run; `batch night` "
        "lists them, `batch backfill` runs them.",
        headline=MISSED,
    )


def test_the_table_of_runs_is_locked(story: Story) -> None:
    """Nothing fires meanwhile. No node loses its lease, because nobody could take over its runs
    either.
    """
    with transaction(story, "LOCK TABLE batch_runs IN ACCESS EXCLUSIVE MODE") as pid:
        story.wait(HELD_SECONDS)
        for node in story.nodes.values():
            reasons = node.readiness() or {}
            assert "another transaction holds a lock" in reasons["ledger"], reasons
        assert pid
    story.check_end()
    story.check_told(down("another transaction holds a lock"), headline=MISSED)
    assert not any("could not renew its lease" in node.said for node in story.nodes.values())
