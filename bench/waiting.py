"""What do runs that wait cost: those that wait, those beside them, and those that have nothing to
do with it?

    python bench/waiting.py [--repeats 20] [--groups 100] [--before /path/to/an/older/checkout]

A "look" asks which waiting run may be opened; none may, unless it says so. The runs are in a ledger
that the service's own functions fill and read. The last table is measured on a real service with
POLL_SECONDS at its default. In its first row the service executes A and then B, and the time begins
at A's last line, before its outcome is written. In the second one another node writes A's outcome
and dies right after the commit, at which the time begins.

With --before the inserts and outcomes of runs that wait for nothing are measured with an older
version too, and the statements of both are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, os.environ.get("BENCH_CODE") or str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, f"{sys.path[0]}/bench")

from machine import describe, print_table, version_of
from services import ending, queued, start, wait_until_ready
from sqlalchemy import event, text

from batch_system.batch.ledger import json_rows, runs, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import Origin, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.database.engine import Database
from batch_system.database.migrate import migrate
from batch_system.testing.postgres import PostgresServer, start_server

if not os.environ.get("BENCH_CODE"):  # an older version has none of these
    from batch_system import BaseTask, TaskRegistry
    from batch_system.batch.firing import task_sync
    from batch_system.batch.firing.waiting import Opener
    from batch_system.batch.ledger import waits
    from batch_system.batch.queue import claiming
    from batch_system.batch.queue.claiming import Capacity

KINDS = ("PostgreSQL", "SQLite")
MANY, TOMORROW = 10_000, 100_000
MOST_SECONDS = 60.0
TASKS = """
import time
from batch_system import BaseTask

def note(name):
    with open("lines", "ab", buffering=0) as file:
        file.write(f"{name} {time.monotonic()}\\n".encode())

class A(BaseTask):
    name, schedule, overlap = "a", None, "allow"
    async def run(self):
        note("a")

class B(BaseTask):
    name, schedule, overlap = "b", None, "allow"
    async def run(self):
        note("b")
"""


async def new_ledger(server: PostgresServer, kind: str, folder: Path) -> Database:
    file = f"sqlite+aiosqlite:///{folder}/{new_id()}.db"
    url = await server.create_database() if kind == "PostgreSQL" else file
    ledger = Database(url, setting="LEDGER_URL", pool_size=5)
    await migrate(ledger, LEDGER_HISTORY)
    return ledger


async def write(
    ledger: Database, new: Sequence[NewRun], rows: Sequence[dict[str, Any]] = ()
) -> None:
    async with ledger.engine.begin() as connection:
        for first in range(0, len(new), MANY):
            await json_rows.insert(
                connection, runs.runs, [vars(run) for run in new[first : first + MANY]]
            )
        if rows:
            await json_rows.insert(connection, waits.waits, rows)
    if ledger.kind == "postgresql":
        async with ledger.engine.connect() as connection:
            await connection.execute(text("ANALYZE"))


def waiting_slots(number: int, upstream: RunState) -> tuple[list[NewRun], list[dict[str, Any]]]:
    """So many runs that wait for slots of two other tasks, and the runs of these, which are in the
    state `upstream`.
    """
    now, made, rows = datetime.now(UTC), [], []
    for n, run in enumerate(queued(["down"] * number)):
        slot = now - timedelta(days=30) + timedelta(minutes=n)
        of_slot = {"slot": slot, "origin": Origin.SCHEDULE, "rank": Rank.ON_TIME}
        run = replace(
            run,
            **of_slot,
            state=RunState.WAITING,
            gate="success",
            wait_until=now + timedelta(days=1),
        )
        ups = [replace(up, **of_slot, state=upstream) for up in queued(["up-1", "up-2"])]
        made += [run, *ups]
        rows += [{"run": run.id, "task": up.task, "slot": slot} for up in ups]
    return made, rows


def groups(number: int, size: int) -> list[NewRun]:
    made = []
    for then in queued(["then"] * number):
        made.append(replace(then, state=RunState.WAITING, gate="success"))
        made += [replace(member, awaited_by=then.id) for member in queued(["member"] * size)]
    return made


def tomorrow(state: RunState) -> list[NewRun]:
    at = datetime.now(UTC) + timedelta(days=1)
    return [replace(run, state=state, due_at=at) for run in queued(["later"] * TOMORROW)]


async def milliseconds(what: Callable[[], Awaitable[Any]], repeats: int) -> str:
    """The median, and in brackets the fastest."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        await what()
        times.append((time.perf_counter() - began) * 1000)
    return f"{median(times[1:]):.2f} ({min(times[1:]):.2f})"  # the first one prepares the statement


async def look(ledger: Database) -> None:
    async with ledger.reader.connect() as connection:
        assert not await waits.is_any_ready(connection, datetime.now(UTC))


async def looks(server: PostgresServer, kind: str, folder: Path, repeats: int) -> dict[str, str]:
    found = {}
    for number in (0, 100, 1_000, 10_000):
        ledger = await new_ledger(server, kind, folder)
        await write(ledger, *waiting_slots(number, RunState.QUEUED))
        found[f"look: {number:,} slots that wait for two others each"] = await milliseconds(
            partial(look, ledger), repeats
        )
        await ledger.dispose()
    beside = {
        f"look: {TOMORROW:,} runs of tomorrow": tomorrow(RunState.WAITING),
        "look: 1,000 groups of 10": groups(1_000, 10),
        f"look: one group of {MANY:,}": groups(1, MANY),
    }
    for name, made in beside.items():
        ledger = await new_ledger(server, kind, folder)
        await write(ledger, made)
        found[name] = await milliseconds(partial(look, ledger), repeats)
        await ledger.dispose()
    return found


async def openings(server: PostgresServer, kind: str, folder: Path, repeats: int) -> dict[str, str]:
    """Of slots that were fired on time, about whose overlap the node decides."""
    tasks = {"down": task("down")}
    times = []
    for _ in range(max(3, repeats // 5)):
        ledger = await new_ledger(server, kind, folder)
        await write(ledger, *waiting_slots(1_000, RunState.SUCCEEDED))
        opener = Opener(ledger, tasks, lambda: None)
        await look_at_nothing(ledger)
        began, opened = time.perf_counter(), 0
        while settled := await opener.turn():
            opened += settled
        times.append((time.perf_counter() - began) * 1000)
        assert opened == 1_000
        await ledger.dispose()
    return {"opening 1,000 slots": f"{median(times):.0f} ({min(times):.0f})"}


async def look_at_nothing(ledger: Database) -> None:
    """So that both engines have a connection."""
    for engine in (ledger.engine, ledger.reader):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))


def task(name: str) -> Any:
    async def run(self: object) -> None: ...

    TaskRegistry.register(
        type(name, (BaseTask,), {"name": name, "schedule": None, "overlap": "allow", "run": run})
    )
    return TaskRegistry.get(name)


async def claims(server: PostgresServer, kind: str, folder: Path, repeats: int) -> dict[str, str]:
    found = {}
    loaded = {name: task(name) for name in ("mine", "later")}
    beside = {
        "claim: nothing beside it": [],
        f"claim: {TOMORROW:,} runs of tomorrow, waiting": tomorrow(RunState.WAITING),
        f"claim: {TOMORROW:,} retries of tomorrow": tomorrow(RunState.RETRYING),
    }
    for name, made in beside.items():
        ledger = await new_ledger(server, kind, folder)
        async with ledger.engine.begin() as connection:
            await task_sync.record_tasks(connection, loaded, datetime.now(UTC))
        await write(ledger, made)
        await write(ledger, queued(["mine"] * (repeats + 1)))

        async def claim(ledger: Database = ledger) -> None:
            async with ledger.engine.begin() as connection:
                assert (await claiming.take(connection, loaded, NODE, Capacity(1, 1)))[0]

        found[name] = await milliseconds(claim, repeats)
        await ledger.dispose()
    return found


NODE = new_id()


async def uses_none_of_it(url: str, repeats: int) -> dict[str, Any]:
    """Insert, claim and end runs that wait for nothing. Returns the statements, and how long it
    took.
    """
    ledger = Database(url, setting="LEDGER_URL", pool_size=1)
    sent: dict[str, int] = {}

    def see(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE", "SELECT", "WITH")):
            sent[statement] = sum(len(str(value)) for value in parameters)

    times: dict[str, list[float]] = {"insert": [], "outcomes": []}
    for number in range(repeats):
        new = queued(["mine"] * MANY)
        if not number:
            event.listen(ledger.engine.sync_engine, "before_cursor_execute", see)
        began = time.perf_counter()
        async with ledger.engine.begin() as connection:
            await runs.insert(connection, new)
        times["insert"].append((time.perf_counter() - began) * 1000)
        async with ledger.engine.begin() as connection:
            now = datetime.now(UTC)
            await transitions.claim(connection, [run.id for run in new], NODE, now)
        ends = [
            Outcome(run.id, 1, RunState.SUCCEEDED, "succeeded", 1, NODE, "mine", now, now)
            for run in new
        ]
        began = time.perf_counter()
        async with ledger.engine.begin() as connection:
            assert await transitions.finish(connection, ends) == []
        times["outcomes"].append((time.perf_counter() - began) * 1000)
    await ledger.dispose()
    written = {name: f"{median(values):.0f} ({min(values):.0f})" for name, values in times.items()}
    return {"times": written, "statements": [[statement, size] for statement, size in sent.items()]}


async def unused(
    server: PostgresServer, kind: str, folder: Path, repeats: int, code: str
) -> dict[str, Any]:
    """In a process of its own, with the code in the folder `code`."""
    file = f"sqlite+aiosqlite:///{folder}/{new_id()}.db"
    url = await server.create_database() if kind == "PostgreSQL" else file
    command = [sys.executable, __file__, "--only", url, "--repeats", str(repeats)]
    environment = {**os.environ, "BENCH_CODE": code, "PYTHONPATH": code}
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


async def only(url: str, repeats: int) -> None:
    ledger = Database(url, setting="LEDGER_URL")
    await migrate(ledger, LEDGER_HISTORY)
    await ledger.dispose()
    print(json.dumps(await uses_none_of_it(url, repeats)))


async def follow(
    server: PostgresServer, kind: str, folder: Path, number: int
) -> dict[str, list[float]]:
    """Milliseconds from A's end to B's first line: on the node that wrote A's outcome, and on
    another one.
    """
    own = folder / f"{kind}-service"
    (own / "tasks").mkdir(parents=True)
    (own / "tasks/both.py").write_text(TASKS)
    (own / "lines").touch()
    url = (
        await server.create_database()
        if kind == "PostgreSQL"
        else f"sqlite+aiosqlite:///{own}/ledger.db"
    )
    found: dict[str, list[float]] = {"the node that wrote the outcome": [], "another node": []}
    with ending() as workers:
        workers.append(start(own, {"DATABASE_URL": f"sqlite:///{own}/app.db", "LEDGER_URL": url}))
        await asyncio.to_thread(wait_until_ready, workers)
        ledger = Database(url, setting="LEDGER_URL", pool_size=1)
        for _ in range(number):
            await asyncio.sleep(0.05)
            before = await lines(own, 0)
            await write_group(ledger, RunState.QUEUED)
            a, b = (await lines(own, len(before) + 2))[-2:]
            found["the node that wrote the outcome"].append((b - a) * 1000)
            member = await write_group(ledger, RunState.RUNNING)
            now = datetime.now(UTC)
            outcome = Outcome(member.id, 1, RunState.SUCCEEDED, "succeeded", 1, NODE, "a", now, now)
            async with ledger.engine.begin() as connection:
                assert await transitions.finish(connection, [outcome]) == []
            committed = time.monotonic()
            found["another node"].append(
                ((await lines(own, len(before) + 3))[-1] - committed) * 1000
            )
        await ledger.dispose()
    return found


async def write_group(ledger: Database, state: RunState) -> NewRun:
    """A and then B. Returns A's run: a queued one, or one that this process is executing."""
    now = datetime.now(UTC)
    a, b = queued(["a", "b"])
    b = replace(b, state=RunState.WAITING, gate="success")
    a = replace(a, awaited_by=b.id)
    if state == RunState.RUNNING:
        a = replace(
            a, state=state, node=NODE, fence=1, attempt=1, started_at=now, attempt_started_at=now
        )
    async with ledger.engine.begin() as connection:
        await json_rows.insert(connection, runs.runs, [vars(b), vars(a)])
    return a


async def lines(folder: Path, number: int) -> list[float]:
    """When each line was written; waits until there are so many."""
    async with asyncio.timeout(MOST_SECONDS):
        while True:
            there = (folder / "lines").read_text().splitlines()
            if len(there) >= number:
                return [float(line.split()[1]) for line in there]
            await asyncio.sleep(0.01)


async def measure(server: PostgresServer, folder: Path, options: argparse.Namespace) -> None:
    columns: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for part in (looks, openings, claims):
            columns[kind] |= await part(server, kind, folder, options.repeats)
    rows = [[name, *(columns[kind][name] for kind in KINDS)] for name in columns[KINDS[0]]]
    print_table(f"Median (fastest) of {options.repeats}: ms", [["", *KINDS], *rows])
    await compare(server, folder, options)
    table = [["B begins on", "database", "groups", "min", "p50", "p99", "max"]]
    for kind in KINDS:
        for name, times in (await follow(server, kind, folder, options.groups)).items():
            figures = [
                min(times),
                median(times),
                quantiles(times, n=100, method="inclusive")[98],
                max(times),
            ]
            table.append([name, kind, str(len(times)), *(f"{figure:.0f}" for figure in figures)])
    print_table(
        "From the end of A to the first line of B: ms (goals for p99: 100, and 1500 on another "
        "node)",
        table,
    )


async def compare(server: PostgresServer, folder: Path, options: argparse.Namespace) -> None:
    codes = {"now": str(Path(__file__).resolve().parents[1])}
    if options.before:
        codes = {"before": options.before, **codes}
    rows = [
        ["", "database", "insert", "outcomes", "statements", "characters of SQL", "of parameters"]
    ]
    for kind in KINDS:
        for name, code in codes.items():
            found = await unused(server, kind, folder, max(3, options.repeats // 4), code)
            times, statements = found["times"], found["statements"]
            sizes = [
                len(statements),
                sum(len(sql) for sql, _ in statements),
                sum(size for _, size in statements),
            ]
            rows.append(
                [name, kind, times["insert"], times["outcomes"], *(f"{size:,}" for size in sizes)]
            )
    print_table(f"{MANY:,} runs that wait for nothing, median (fastest): ms", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--groups", type=int, default=100, help="that are followed on each database"
    )
    parser.add_argument("--before", help="a folder with an older version, to compare with")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        asyncio.run(only(options.only, options.repeats))
        return
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as name:
        describe(postgresql=asyncio.run(version_of(server.url)))
        asyncio.run(measure(server, Path(name), options))


if __name__ == "__main__":
    main()
