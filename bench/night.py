"""How long does the answer about the night take, on a ledger with very many slots in the window?

    python bench/night.py [--runs 1000000] [--slots 176000] [--requests 50]
                          [--kinds sqlite postgresql]

For each database a ledger is made in which 200 tasks were due every minute: so many runs in all,
and so many slots in the window. One run in 20,000 has failed and is open. The tally is kept by the
code that keeps it in a service. Then a real `batch serve` on this ledger is asked over loopback,
and `batch night` is run as a command. A bare `SELECT 1` through the same driver, and the answer of
/healthz, are measured beside, in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median, quantiles

import httpx
from machine import describe, print_table, version_of
from sqlalchemy import insert, text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.batch.ledger import database_time, duties, tables
from batch_system.batch.ledger.duties import WATCH
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.states import Origin, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.night.keeper import TallyKeeper
from batch_system.batch.nodes.outage import Outage
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import start_server

TASKS = 200
AT_ONCE = 20_000
FAILED_EVERY = 20_000
MINUTE = timedelta(minutes=1)
LONGEST_LAG = 10.0


async def fill(ledger: Database, number: int, now: datetime) -> None:
    """Tasks that were due every minute, with a run for each slot up to this minute."""
    node, minutes = new_id(), number // TASKS
    first = now - minutes * MINUTE
    names = [f"task-{n:03}" for n in range(TASKS)]
    async with ledger.engine.begin() as connection:
        row = {
            "id": node,
            "host": "here",
            "pid": 1,
            "version": "1",
            "draining": False,
            "tasks": names,
        }
        await connection.execute(
            insert(tables.nodes), {**row, "started_at": first, "seen_at": now, "noticed_at": now}
        )
        known = {
            "description": "",
            "source": "tasks/some.py",
            "policies": {},
            "first_seen_at": first,
        }
        await connection.execute(
            insert(tables.tasks), [{"name": n, **known, "last_seen_at": now} for n in names]
        )
        span = {
            "cron": "* * * * *",
            "timezone": "UTC",
            "valid_from": first,
            "node": node,
            "fired_until": now,
        }
        await connection.execute(
            insert(tables.schedules), [{"id": new_id(), "task": n, **span} for n in names]
        )
    rows = []
    for minute in range(1, minutes + 1):
        slot = first + minute * MINUTE
        rows += [
            _run(name, slot, node, (minute * TASKS + n) % FAILED_EVERY == 0)
            for n, name in enumerate(names)
        ]
        if len(rows) >= AT_ONCE or minute == minutes:
            async with ledger.engine.begin() as connection:
                await connection.execute(insert(tables.runs), rows)
            rows = []


def _run(name: str, slot: datetime, node: str, is_bad: bool) -> dict[str, object]:
    end = slot + timedelta(seconds=2)
    return {
        "id": new_id(),
        "task": name,
        "slot": slot,
        "origin": Origin.SCHEDULE,
        "state": RunState.FAILED if is_bad else RunState.SUCCEEDED,
        "reason": "ValueError: it failed" if is_bad else None,
        "fingerprint": "1:abc" if is_bad else None,
        "noticed_at": end if is_bad else None,
        "rank": Rank.ON_TIME,
        "catch_up": False,
        "due_at": slot,
        "created_at": slot,
        "started_at": slot,
        "attempt_started_at": slot,
        "finished_at": end,
        "attempt": 1,
        "fence": 1,
        "node": node,
    }


async def tally(ledger: Database) -> float:
    """Count all buckets, as a service does in the background. Returns how many seconds that
    takes.
    """
    node = new_id()
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        await duties.take_from_the_dead(connection, WATCH, node, now, LONGEST_LAG)
    keeper = TallyKeeper(ledger, node, lambda: True, Outage())
    began = time.monotonic()
    await keeper.keep_up()
    return time.monotonic() - began


def timed(call: Callable[[], object], number: int) -> list[float]:
    """The milliseconds of so many calls, after two that do not count."""
    took = []
    for _ in range(number + 2):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1000)
    return took[2:]


def line(what: str, took: Sequence[float]) -> tuple[str, ...]:
    """A line of the table."""
    return what, f"{median(took):.1f}", f"{quantiles(took, n=20)[-1]:.1f}"


async def measure(kind: str, arguments: argparse.Namespace, folder: Path, url: str) -> None:
    """Fill a ledger, serve it, and ask."""
    ledger = Database(url, setting="LEDGER_URL")
    await migrate(ledger, LEDGER_HISTORY)
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    await fill(ledger, arguments.runs, now)
    async with ledger.engine.connect() as connection:
        await connection.execute(text("ANALYZE"))
    seconds = await tally(ledger)
    bare = []
    for _ in range(arguments.requests):
        began = time.perf_counter()
        async with ledger.reader.connect() as connection:
            await connection.execute(text("SELECT 1"))
        bare.append((time.perf_counter() - began) * 1000)
    await ledger.dispose()
    since = (now - arguments.slots // TASKS * MINUTE).isoformat().replace("+00:00", "Z")
    rows = await asyncio.to_thread(ask, folder, url, since, arguments.requests)
    kept = f"the tally of {arguments.runs // TASKS // 10:,} buckets took {seconds:.1f} s"
    title = f"{kind}: {arguments.runs:,} runs, {arguments.slots:,} slots in the window; {kept}"
    print_table(title, [("", "p50, ms", "p95, ms"), line("SELECT 1", bare), *rows])


def ask(folder: Path, url: str, since: str, number: int) -> list[tuple[str, ...]]:
    """Ask a real service over loopback, and run the command. The tasks are not loaded, so that none
    fires meanwhile.
    """
    environment = {
        **os.environ,
        "LEDGER_URL": url,
        "BATCH_AUTH": "off",
        "BATCH_REQUESTS_PER_SECOND": "10000",
    }
    if url.startswith("postgresql"):
        environment["DATABASE_URL"] = url
    (folder / "tasks").mkdir()
    command = (sys.executable, "-m", "batch_system")
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    with (
        (folder / "out").open("w") as out,
        subprocess.Popen(
            [*command, "serve", "--port", "0"], cwd=folder, env=environment, stdout=out, stderr=out
        ) as service,
    ):
        try:
            address = _address(folder / "out")
            with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
                window = {"since": since}
                answer = client.get("/api/v1/night", params=window).json()
                print(answer["sentence"])
                rows = [
                    line("/healthz", timed(lambda: client.get("/healthz"), number)),
                    line(
                        "/api/v1/night, the window",
                        timed(lambda: client.get("/api/v1/night", params=window), number),
                    ),
                    line(
                        "/api/v1/night, since 18:00",
                        timed(lambda: client.get("/api/v1/night"), number),
                    ),
                ]
                failed = client.get("/api/v1/runs", params={"state": "failed", "limit": 1}).json()
                task = failed["runs"][0]["task"]
                rows += [
                    line(f"/api/v1/{what}", timed(_ask(client, f"/api/v1/{what}"), number))
                    for what in (f"runs/{failed['runs'][0]['id']}/why", f"tasks/{task}/why")
                ]
            few = max(5, number // 10)
            rows.append(
                line(
                    "batch --version",
                    timed(lambda: _run_command(command, folder, environment, "--version"), few),
                )
            )
            rows.append(
                line(
                    "batch night",
                    timed(
                        lambda: _run_command(
                            command, folder, environment, "night", "--since", since
                        ),
                        few,
                    ),
                )
            )
            return rows
        finally:
            service.terminate()


def _run_command(
    command: Sequence[str], folder: Path, environment: dict[str, str], *words: str
) -> None:
    done = subprocess.run(
        [*command, *words], cwd=folder, env=environment, capture_output=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr


def _ask(client: httpx.Client, path: str) -> Callable[[], object]:
    return lambda: client.get(path).raise_for_status()


def _address(out: Path) -> str:
    give_up_at = time.monotonic() + 60
    while time.monotonic() < give_up_at:
        for word in out.read_text().split():
            if word.startswith("http://127.0.0.1:"):
                return word
        time.sleep(0.1)
    raise SystemExit(f"the service did not start: {out.read_text()}")


async def main() -> None:
    """Measure each kind of database in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--slots", type=int, default=176_000)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument(
        "--kinds", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"]
    )
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if kind == "postgresql":
                url = await stack.enter_context(start_server()).create_database()
                describe(postgresql=await version_of(url))
            else:
                describe()
                url = f"sqlite+aiosqlite:///{folder}/ledger.db"
            await measure(kind, arguments, folder, url)


if __name__ == "__main__":
    asyncio.run(main())
