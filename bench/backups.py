"""How fast, how large and how quiet is a backup, beside pg_dump and beside sqlite3's own copy?

    python bench/backups.py [--short] [--scale 60] [--rows 300000] [--sqlite-mb 500] [--rounds 2]

PostgreSQL: the tables of pgbench, rows as applications have them (text, jsonb, bytea, arrays,
numeric, uuid, an enum, a generated column), and both, each backed up by `pg_dump | gzip -6`, by
`pg_dump -Fc` and by create_backup(), in turns; the best of the rounds counts. SQLite: a file of
such rows, by `sqlite3 .backup` and `gzip -6`, and by create_backup().

"written" is until the last byte is in the file, "verified" until it was read back as well and has
its name. CPU is that of the programs that are named, and of PostgreSQL for them. Memory is the most
that these programs ever had resident, added up; of ours that of the process that makes it. What
create_backup() does to the loop of the process that calls it is in bench/beside.py. At the end: the
same with a quarter of the rows; and verifying a backup, comparing it with its database and
restoring it. `--short` takes a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
from machine import describe, print_table, version_of
from services import cpu_seconds
from sqlalchemy import make_url

from batch_system.backup.comparing.compare import diff
from batch_system.backup.file.source import LocalFile
from batch_system.backup.file.verify import verify
from batch_system.backup.restoring.restore import restore
from batch_system.concurrency.stoppable import Stop
from batch_system.config import Settings
from batch_system.testing.postgres import OwnServer, PostgresServer, find_binaries, start_server

HERE = Path(__file__).resolve().parent
LOOK_SECONDS = 0.01
MOST_MB = 100.0
MOST_LATE_MS = 10.0

TEXT = """
invoice customer delivery address street payment reminder account balance refund order shipped
returned pending approved because although between through without please regards morning evening
question answer support ticket warehouse container pallet weight volume discount voucher season
autumn winter summer spring the a of and to in is was for on with as at by from this that it not are
be have had
"""
WORDS = TEXT.split()

ORDERS = """
CREATE TYPE state AS ENUM ('new', 'paid', 'shipped', 'returned');
CREATE TABLE orders (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer uuid NOT NULL,
    state state NOT NULL,
    placed_at timestamptz NOT NULL,
    note text,
    tags text[] NOT NULL,
    details jsonb NOT NULL,
    attachment bytea,
    net numeric(12, 2) NOT NULL,
    gross numeric(14, 4) GENERATED ALWAYS AS (net * 1.19) STORED
);
"""
FILL_ORDERS = """
INSERT INTO orders (customer, state, placed_at, note, tags, details, attachment, net)
SELECT gen_random_uuid(),
    (enum_range(NULL::state))[1 + n % 4],
    '2026-01-01'::timestamptz + n * interval '37 seconds',
    CASE WHEN n % 10 > 0 THEN (
        SELECT string_agg(($2::text[])[1 + (random() * ($3 - 1))::int], ' ')
        FROM generate_series(1, 60 + n % 40)
    ) END,
    ARRAY[($2::text[])[1 + n % $3], ($2::text[])[1 + (n * 7) % $3]],
    jsonb_build_object('source', ($2::text[])[1 + (n * 3) % $3], 'items', n % 9, 'paid', n % 2 = 0,
        'trace', md5(n::text), 'address', jsonb_build_object('zip', 10000 + n % 80000)),
    CASE WHEN n % 3 = 0 THEN decode(md5(random()::text) || md5(random()::text), 'hex') END,
    round((random() * 5000)::numeric, 2)
FROM generate_series(1, $1::int) n
"""
PGBENCH = """
CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, bid int, abalance int, filler char(84));
CREATE TABLE pgbench_branches (bid int PRIMARY KEY, bbalance int, filler char(88));
CREATE TABLE pgbench_tellers (tid int PRIMARY KEY, bid int, tbalance int, filler char(84));
CREATE TABLE pgbench_history (
    tid int, bid int, aid int, delta int, mtime timestamp, filler char(22)
);
INSERT INTO pgbench_branches SELECT n, 0, '' FROM generate_series(1, {scale}) n;
INSERT INTO pgbench_tellers
    SELECT n, (n - 1) / 10 + 1, 0, '' FROM generate_series(1, {scale} * 10) n;
INSERT INTO pgbench_accounts
    SELECT n, (n - 1) / 100000 + 1, 0, '' FROM generate_series(1, {scale} * 100000) n;
"""


@dataclass(frozen=True)
class Figures:
    """Of one backup. `written` and `late` are known of ours only."""

    seconds: float
    cpu: float
    server_cpu: float
    megabytes: float
    peak: float
    path: Path
    written: float = 0.0
    late: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Case:
    """A database, the ways to back it up, and what ours is to reach."""

    title: str
    url: str
    faster: float
    ways: Mapping[str, Callable[[], Figures]]


class Peaks:
    """The most memory that each process below this one has had resident, looked at all the time."""

    def __init__(self, but: str) -> None:
        self._but = but
        self._found: dict[int, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return sum(self._found.values()) / 1024

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            for pid in descendants(os.getpid()):
                with contextlib.suppress(OSError, StopIteration):  # it has just ended
                    if self._but not in Path(f"/proc/{pid}/cmdline").read_text():
                        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                        peak = next(
                            int(line.split()[1]) for line in lines if line.startswith("VmHWM")
                        )
                        self._found[pid] = (
                            peak  # it never sinks, but at the start of the program itself
                        )


def descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, file.read_text().split()):
                if "postgres" not in Path(f"/proc/{child}/comm").read_text():
                    yield child
                    yield from descendants(child)


class Bench:
    """The server, its client programs where there are some, and a folder for what is written."""

    def __init__(self, server: PostgresServer, folder: Path, options: argparse.Namespace) -> None:
        self.server = server
        self.folder = folder
        self.options = options
        self._guard = _postmaster(server)

    def program(self, name: str) -> str | None:
        """PostgreSQL's own, of the server's version; else one of the system's; else there is
        none.
        """
        beside = find_binaries() / name if isinstance(self.server, OwnServer) else Path(name)
        return str(beside) if beside.is_file() else shutil.which(name)

    def pipeline(
        self, commands: Sequence[Sequence[str]], to: Path, environment: Mapping[str, str]
    ) -> Figures:
        """Each command reads what the one before it writes; the last one writes the file."""
        os.sync()
        began_at, server_cpu = time.perf_counter(), self._server_cpu()
        running: list[subprocess.Popen[bytes]] = []
        with to.open("wb") as output, Peaks(but=" never ") as peaks:
            for number, command in enumerate(commands):
                is_last = number + 1 == len(commands)
                source = running[-1].stdout if running else subprocess.DEVNULL
                goes_to = output if is_last else subprocess.PIPE
                env = {**os.environ, **environment}
                running.append(subprocess.Popen(command, stdin=source, stdout=goes_to, env=env))
                if running[:-1] and (pipe := running[-2].stdout):
                    pipe.close()
            cpu = sum(_cpu_at_the_end(process) for process in running)
        seconds = time.perf_counter() - began_at
        return self._figures(seconds, cpu, server_cpu, peaks, to)

    def ours(self, url: str) -> Figures:
        os.sync()  # or its fsync would wait for what the ways before it have left to the system
        server_cpu = self._server_cpu()
        with Peaks(but="beside.py") as peaks:
            said = self.beside("backup", url)
        figures = self._figures(
            said["verified"], said["cpu"], server_cpu, peaks, Path(said["path"])
        )
        return Figures(**{**vars(figures), "written": said["written"], "late": said["late"]})

    def beside(self, mode: str, url: str) -> Any:
        """What bench/beside.py says, started with a new folder for its backup."""
        kept = {
            name: value for name, value in os.environ.items() if name not in Settings.model_fields
        }
        command = [sys.executable, str(HERE / "beside.py"), mode, tempfile.mkdtemp(dir=self.folder)]
        done = subprocess.run(
            command,
            env={**kept, "DATABASE_URL": url},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
        return json.loads(done.stdout)

    def _figures(
        self, seconds: float, cpu: float, server_cpu: float, peaks: Peaks, path: Path
    ) -> Figures:
        time.sleep(0.3)  # until the server's processes have ended, whose CPU time counts only then
        used = self._server_cpu() - server_cpu
        return Figures(seconds, cpu, used, path.stat().st_size / 1e6, peaks.megabytes, path)

    def _server_cpu(self) -> float:
        return cpu_seconds(self._guard, with_ended_children=True) if self._guard else 0.0


def _cpu_at_the_end(process: subprocess.Popen[bytes]) -> float:
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{process.args!r} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def _postmaster(server: PostgresServer) -> int | None:
    """The process whose ended children are the backends."""
    if not isinstance(server, OwnServer):
        return None
    return int((server.directory / "data/postmaster.pid").read_text().split()[0])


# The databases


async def pgbench(bench: Bench, scale: int) -> str:
    url = await bench.server.create_database()
    if (program := bench.program("pgbench")) is not None:
        command = [program, "--initialize", "--quiet", f"--scale={scale}"]
        environment = {**os.environ, **of_libpq(url)}
        made = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, check=False
        )
        if made.returncode:
            raise SystemExit(made.stderr.decode())
    else:
        print("there is no pgbench here: its tables are made by SQL")
        await execute(url, PGBENCH.format(scale=scale))
    await execute(url, "VACUUM ANALYZE", "CHECKPOINT")
    return url


async def realistic(bench: Bench, rows: int, beside: str = "template1") -> str:
    """`beside`: the name of a database whose tables there are too."""
    url = await bench.server.create_database(beside)
    await execute(url, ORDERS)
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    await connection.execute(FILL_ORDERS, rows, WORDS, len(WORDS))
    await connection.close()
    await execute(url, "VACUUM ANALYZE", "CHECKPOINT")
    return url


async def execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


def megabytes(url: str) -> str:
    """The size of a database, in words."""

    async def asked() -> int:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            return int(await connection.fetchval("SELECT pg_database_size(current_database())"))
        finally:
            await connection.close()

    return f"{asyncio.run(asked()) / 1e6:.0f} MB"


def of_libpq(url: str) -> dict[str, str]:
    parsed = make_url(url)
    named = {
        "PGHOST": parsed.query.get("host", parsed.host),
        "PGPORT": parsed.query.get("port", parsed.port),
        "PGUSER": parsed.username,
        "PGPASSWORD": parsed.password,
        "PGDATABASE": parsed.database,
    }
    return {name: str(value) for name, value in named.items() if value}


def fill_sqlite(path: Path, megabytes: int) -> None:
    """Rows like those above, until the file is so large."""
    chance = random.Random(1)
    notes = [" ".join(chance.choices(WORDS, k=60)) for _ in range(5_000)]
    columns = "customer TEXT, note TEXT, details TEXT, attachment BLOB, net REAL"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(f"CREATE TABLE orders (id INTEGER PRIMARY KEY, {columns})")
        while path.stat().st_size < megabytes * 1e6:
            rows = [
                (
                    chance.randbytes(16).hex(),
                    f"{chance.choice(notes)} {number}",
                    json.dumps(
                        {
                            "items": number % 9,
                            "paid": number % 2 == 0,
                            "trace": chance.randbytes(8).hex(),
                        }
                    ),
                    chance.randbytes(64) if number % 3 == 0 else None,
                    chance.random() * 5000,
                )
                for number in range(5_000)
            ]
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO orders VALUES (NULL, ?, ?, ?, ?, ?)", rows)
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


# The ways to back them up


def postgresql(bench: Bench, title: str, url: str, faster: float) -> Case:
    ways: dict[str, Callable[[], Figures]] = {}
    if (dump := bench.program("pg_dump")) is not None:
        gzip, custom = bench.folder / "dump.sql.gz", bench.folder / "dump.custom"
        ways["pg_dump | gzip -6"] = lambda: bench.pipeline(
            [[dump], ["gzip", "-6"]], gzip, of_libpq(url)
        )
        ways["pg_dump -Fc"] = lambda: bench.pipeline([[dump, "-Fc"]], custom, of_libpq(url))
    else:
        print("there is no pg_dump here: ours stands alone")
    return Case(
        f"{title}: {megabytes(url)}", url, faster, {**ways, "ours": lambda: bench.ours(url)}
    )


def sqlite(bench: Bench, megabytes: int) -> Case:
    file, copy = bench.folder / f"app-{megabytes}.db", bench.folder / "copy.db"
    fill_sqlite(file, megabytes)
    url = f"sqlite+aiosqlite:///{file}"
    program = shutil.which("sqlite3")
    by_python = "import sqlite3, sys; a, b = map(sqlite3.connect, sys.argv[1:]); a.backup(b)"
    copying = (
        [program, str(file), f".backup {copy}"]
        if program
        else [sys.executable, "-c", by_python, str(file), str(copy)]
    )
    if not program:
        print("there is no sqlite3 here: its copy is made by Python's Connection.backup()")

    def theirs() -> Figures:
        copy.unlink(missing_ok=True)
        one = bench.pipeline([copying], bench.folder / "said", {})
        two = bench.pipeline([["gzip", "-6", "-c", str(copy)]], bench.folder / "copy.db.gz", {})
        peak = max(one.peak, two.peak)
        return Figures(
            one.seconds + two.seconds, one.cpu + two.cpu, 0.0, two.megabytes, peak, two.path
        )

    return Case(
        f"SQLite, {megabytes} MB",
        url,
        8.0,
        {"sqlite3 .backup, gzip -6": theirs, "ours": lambda: bench.ours(url)},
    )


# What is printed


def measure(case: Case, rounds: int) -> Figures:
    """Ways in turns; prints the best of each, and returns ours."""
    best: dict[str, Figures] = {}
    for _ in range(rounds):
        for name, way in case.ways.items():
            figures = way()
            if name not in best or figures.seconds < best[name].seconds:
                best[name] = figures
    ours = best.pop("ours")
    rows = [["", "wall s", "CPU s", "server's CPU s", "MB", "memory, MB"]]
    rows += [[name, f"{one.seconds:.2f}", *_others(one)] for name, one in best.items()]
    rows += [
        ["ours, written", f"{ours.written:.2f}", "", "", "", ""],
        ["ours, written and verified", f"{ours.seconds:.2f}", *_others(ours)],
    ]
    print_table(f"{case.title}, best of {rounds}", rows)
    for name, one in best.items():
        is_goal = name == next(iter(best))
        written, verified = one.seconds / ours.written, one.seconds / ours.seconds
        goal = f" (goal >= {case.faster:g}: {_yes(written >= case.faster)})" if is_goal else ""
        larger = (ours.megabytes / one.megabytes - 1) * 100
        size = f" (goal <= +15%: {_yes(larger <= 15)})" if is_goal and "pg_dump" in name else ""
        print(
            f"{name} to ours: {written:.1f} times as long as written{goal}, {verified:.1f} as "
            "written and verified;"
        )
        print(f"    {one.cpu / ours.cpu:.1f} times the CPU; ours is {larger:+.0f}% larger{size}")
    print(
        f"memory of ours: {ours.peak:.0f} MB (goal < {MOST_MB:g}: {_yes(ours.peak < MOST_MB)})",
        flush=True,
    )
    return ours


def _others(one: Figures) -> list[str]:
    return [f"{one.cpu:.2f}", f"{one.server_cpu:.2f}", f"{one.megabytes:.1f}", f"{one.peak:.0f}"]


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def show_lateness(bench: Bench, url: str, beside_process: Mapping[str, float]) -> None:
    idle = bench.beside("idle", url)["late"]
    rows = [["", "p50", "p99", "max"]]
    for name, late in {"idle": idle, "beside ours": beside_process}.items():
        rows.append([name, *(f"{late[one]:.2f}" for one in ("p50", "p99", "max"))])
    print_table("How late a sleep of 5 ms ends in the process that makes the backup, ms", rows)
    above = beside_process["p99"] - idle["p99"]
    print(
        f"p99 above idle: {above:.1f} ms (goal <= {MOST_LATE_MS:g}: {_yes(above <= MOST_LATE_MS)})",
        flush=True,
    )


def show_growth(bench: Bench, found: Mapping[str, tuple[str, Figures]]) -> None:
    """`found`: the URL of a quarter of it, and the figures of the whole."""
    rows = [["", "wall s", "four times", "times", "memory, MB", "four times"]]
    for title, (url, whole) in found.items():
        quarter = min(
            (bench.ours(url) for _ in range(bench.options.rounds)), key=lambda one: one.seconds
        )
        times = f"{whole.seconds / quarter.seconds:.1f}"
        peaks = [f"{quarter.peak:.0f}", f"{whole.peak:.0f}"]
        rows.append([title, f"{quarter.seconds:.2f}", f"{whole.seconds:.2f}", times, *peaks])
    print_table("Ours, a database and one four times larger", rows)


def show_reading(made: Mapping[str, tuple[str, Figures]]) -> None:
    """Of ours: verify, compare with the database (which has changed in nothing), and restore into
    it, in this order.
    """
    rows = [["", "verify s", "diff s", "restore s", "restore to verify", "goal"]]
    for title, (url, figures) in made.items():
        seconds = [
            timed(work)
            for work in (
                verifying(figures.path),
                comparing(url, figures.path),
                restoring(url, figures.path),
            )
        ]
        times = seconds[-1] / seconds[0]
        rows.append(
            [title, *(f"{one:.2f}" for one in seconds), f"{times:.1f}", f">= 5: {_yes(times >= 5)}"]
        )
    print_table("Reading a backup back, and restoring it", rows)


def timed(work: Callable[[], None]) -> float:
    began_at = time.perf_counter()
    work()
    return time.perf_counter() - began_at


def verifying(backup: Path) -> Callable[[], None]:
    def work() -> None:
        with LocalFile(backup) as file:
            verify(file, Stop())

    return work


def comparing(url: str, backup: Path) -> Callable[[], None]:
    def work() -> None:
        found = asyncio.run(diff(Settings(_env_file=None, DATABASE_URL=url), str(backup)))
        if found.added or found.changed or found.removed:
            raise SystemExit(f"{url} differs from {backup}: the figures are worth nothing")

    return work


def restoring(url: str, backup: Path) -> Callable[[], None]:
    """Onto the database from which it was made."""

    def work() -> None:
        with LocalFile(backup) as file:
            asyncio.run(restore(file, url))

    return work


async def measure_all(bench: Bench) -> None:
    options = bench.options
    urls = {
        "pgbench": await pgbench(bench, options.scale),
        "rows": await realistic(bench, options.rows),
    }
    small = await pgbench(bench, max(options.scale // 4, 1))
    names = [str(make_url(url).database) for url in (urls["pgbench"], small)]
    urls["both"] = await realistic(bench, options.rows, names[0])
    urls["quarter"] = await realistic(bench, options.rows // 4, names[1])
    await asyncio.to_thread(show_all, bench, urls)


def show_all(bench: Bench, urls: Mapping[str, str]) -> None:
    options = bench.options
    tables, rows = f"pgbench, scale {options.scale}", f"{options.rows:,} realistic rows"
    both = measure(postgresql(bench, f"{tables}, and {rows}", urls["both"], 3.0), options.rounds)
    of_rows = measure(postgresql(bench, rows, urls["rows"], 4.0), options.rounds)
    measure(postgresql(bench, tables, urls["pgbench"], 3.0), options.rounds)
    case = sqlite(bench, options.sqlite_mb)
    of_file = measure(case, options.rounds)
    show_lateness(bench, urls["both"], both.late or {})
    small = sqlite(bench, options.sqlite_mb // 4)
    show_growth(
        bench, {"PostgreSQL, both": (urls["quarter"], both), "SQLite": (small.url, of_file)}
    )
    show_reading(
        {
            "PostgreSQL, both": (urls["both"], both),
            rows: (urls["rows"], of_rows),
            "SQLite": (case.url, of_file),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--short", action="store_true", help="small sizes and one round: about a minute"
    )
    parser.add_argument("--scale", type=int, help="of pgbench: 15 MB each (60)")
    parser.add_argument("--rows", type=int, help="realistic rows: 0.9 KB each (300,000)")
    parser.add_argument("--sqlite-mb", type=int, help="megabytes of the SQLite database (500)")
    parser.add_argument("--rounds", type=int, help="of which the best counts (2)")
    options = parser.parse_args()
    sizes = {"scale": 8, "rows": 40_000, "sqlite_mb": 60, "rounds": 1} if options.short else {}
    for name, size in {
        "scale": 60,
        "rows": 300_000,
        "sqlite_mb": 500,
        "rounds": 2,
        **sizes,
    }.items():
        setattr(options, name, getattr(options, name) or size)
    with start_server(fast=False) as server, tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        describe(("asyncpg", "isal", "uvloop"), postgresql=asyncio.run(version_of(server.url)))
        asyncio.run(measure_all(Bench(server, Path(folder), options)))


if __name__ == "__main__":
    main()
