"""Forged backups: every command, and the tasks, on each. What is in a file from elsewhere is data,
and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from batch_system import clock
from batch_system.backup.comparing.compare import diff
from batch_system.backup.file.reader import Backup, LocalFile
from batch_system.backup.file.verify import verify
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.concurrency.stoppable import Stop
from batch_system.config import Settings, get_settings
from batch_system.errors import BackupError, DamagedBackup
from batch_system.operations.backups.catalogue import list_backups, rescan
from batch_system.operations.backups.copies import download, upload
from batch_system.operations.backups.delete import delete_old, prune_plans
from batch_system.operations.backups.details import describe_backup
from batch_system.operations.backups.make import check
from batch_system.operations.backups.pins import pin, unpin
from batch_system.operations.backups.restore import (
    RestoreRequest,
    check_by_restoring,
    plan_of,
    restore,
)
from batch_system.operations.backups.results import BackupSummary
from batch_system.testing.postgres import PostgresServer
from tests.asking import access
from tests.backup import forged
from tests.backup.contents import execute
from tests.backup.forged import Forged
from tests.backup.restores import everything
from tests.commands import Batch, in_this_process
from tests.databases import migrated, url_of

KINDS = ("sqlite", "postgresql")
LATEST = "backup_20260329_120000.backup.gz"
FORGED = "backup_20260328_120000.backup.gz"
NOW = datetime(2026, 3, 30, 13, tzinfo=UTC)
LOUD = ("an end of a line", "control characters")
"""Values that would act in a terminal; and those that would act in a database beside them."""
HOSTILE = (*LOUD, "a statement", "a comment", "quotes")
MOST_MEGABYTES = 300
ALL = os.environ.get("FORGED") == "all"
"""Takes all bombs, and each command on each file, as `make nightly` does. Else each kind of
database has one quarter of the files: all commands are done on those that open and are hostile, and
one command on every fourth of the others.
"""
SOME_BOMBS = {
    "sqlite": ("2 GB of a database of zeros",),
    "postgresql": ("60 MB of wide characters",),
}

batch = pytest.fixture(in_this_process)


@dataclass(frozen=True)
class World:
    """A folder with a sound backup, and the application's database with the rows of that backup."""

    kind: str
    url: str
    root: Path
    database: Path
    """A SQLite database: what is in the forged backups of that kind."""

    @property
    def folder(self) -> Path:
        return self.root / "backups"

    async def contents(self) -> Any:
        if self.kind == "postgresql":
            return await everything(self.url)
        with closing(sqlite3.connect(str(make_url(self.url).database))) as connection:
            return list(connection.iterdump())

    def files(self) -> dict[str, str]:
        """The hashes of all files but the database; of the folder of backups only the names."""
        found = {}
        for path in self.root.rglob("*"):
            is_read = path.is_file() and not path.is_symlink() and self.folder not in path.parents
            if not path.name.startswith("app.db"):
                content = hashlib.sha256(path.read_bytes()).hexdigest() if is_read else ""
                found[str(path.relative_to(self.root))] = content
        return found


@pytest.fixture(params=KINDS)
async def world(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    settings: Callable[..., None],
    postgres_server: PostgresServer,
) -> Any:
    kind = request.param
    saved = forged.make_database(tmp_path / "saved.db")
    (tmp_path / "backups").mkdir()
    (tmp_path / "elsewhere").mkdir()
    if kind == "sqlite":
        url = url_of(forged.make_database(tmp_path / "app.db"))
    else:
        url = await postgres_server.create_database()
        await execute(
            url,
            "CREATE TABLE users (id bigserial PRIMARY KEY, email varchar(255))",
            "INSERT INTO users SELECT n, n || '@example.org' FROM generate_series(0, 2) AS n",
            "SELECT setval('users_id_seq', 3)",
            "CREATE TABLE alembic_version (version_num varchar(32))",
            f"INSERT INTO alembic_version VALUES ('{forged.REVISION}')",
        )
    made = World(kind, url, tmp_path, saved)
    forged.sound(made.folder / LATEST, kind, saved)
    settings(
        DATABASE_URL=url,
        LEDGER_URL=url_of(tmp_path / "ledger.db"),
        BACKUP_DIR=str(made.folder),
        BACKUP_URL=f"file://{tmp_path}/elsewhere",
    )
    yield made
    if kind == "postgresql":
        await postgres_server.drop_database(url)


def all_of(world: World) -> Iterator[Forged]:
    yield from forged.field_by_value(world.kind, world.database)
    yield from forged.shapes(world.kind, world.database)


def share_of(world: World) -> Iterator[Forged]:
    """All forged backups, or a quarter of them that depends on the kind of database. (Lists read
    all of them.)
    """
    for number, one in enumerate(all_of(world)):
        if ALL or number % 4 == KINDS.index(world.kind):
            yield one


async def refused(what: str, work: Awaitable[Any]) -> str | None:
    """The error of a command; None if it succeeded. Errors that are no BackupError fail the
    test.
    """
    try:
        await work
    except BackupError as error:
        if not 0 < len(error.message) < 4_100:
            raise
        return error.message
    except Exception as error:
        error.add_note(what)
        raise
    return None


def warn(text: str) -> None:
    assert text


@pytest.mark.rest
async def test_each_command_refuses_a_forged_backup_or_treats_it_as_data(world: World) -> None:
    """Those that are refused are refused in one sentence, before anything is written.

    Nothing in the others is executed: the database has the same rows, tables, keys and sequences
    afterwards, and nothing is left in any folder.
    """
    before, files = await world.contents(), world.files()
    sound, path = str(world.folder / LATEST), world.folder / FORGED
    counts = {"opened": 0, "refused": 0}
    for number, one in enumerate(share_of(world)):
        one.write(path)
        works = of_each_command(get_settings(), str(path), sound)
        if not (ALL or (is_hostile(one, HOSTILE) and is_whole(path))):
            works = works[number // 4 % len(works) :][:1] if number % 4 == 0 else []
        for work in works:
            counts["refused" if await refused(one.what, work()) else "opened"] += 1
        path.unlink()
        assert world.files() == files, one.what
    assert await world.contents() == before
    assert min(counts.values()) > 50


def of_each_command(
    settings: Settings, path: str, sound: str
) -> list[Callable[[], Awaitable[Any]]]:
    return [
        lambda: describe_backup(access(settings), path, warn),
        lambda: check(access(settings), path),
        lambda: diff(settings, path),
        lambda: diff(settings, sound, path),
        lambda: pinned(settings, path),
        lambda: plan_of(access(settings), RestoreRequest(path)),
        lambda: restore(access(settings), RestoreRequest(path, dry_run=True)),
        lambda: check_by_restoring(access(settings), path),
        lambda: restore(access(settings), RestoreRequest(path, safety=False)),
    ]


async def pinned(settings: Settings, path: str) -> None:
    try:
        await pin(access(settings), path, "ann")
    finally:
        await unpin(access(settings), Path(path).name)


@pytest.mark.rest
async def test_a_list_reports_forged_backups_and_shows_the_others_as_before(
    world: World, settings: Callable[..., None], postgres_server: PostgresServer
) -> None:
    """The ledger is in the same kind of database, whose text allows no NUL and no lone
    surrogates.
    """
    url = (
        await postgres_server.create_database()
        if world.kind == "postgresql"
        else url_of(world.root / "ledger.db")
    )
    await migrated(url, LEDGER_HISTORY)
    settings(LEDGER_URL=url)
    names = {}
    for number, one in enumerate(all_of(world)):
        day = f"2025{number // 28 % 12 + 1:02}{number % 28 + 1:02}"
        name = f"backup_{day}_{number // 336:06}.backup.gz"
        one.write(world.folder / name)
        names[name] = one.what
    is_damaged = {name: isinstance(error_of(world.folder / name), DamagedBackup) for name in names}
    for summaries in (await list_backups(access(get_settings()), warn), await rescanned()):
        found = {summary.name: summary for summary in summaries}
        assert found.keys() == {*names, LATEST}
        assert found[LATEST].check == "not verified" and found[LATEST].database == "app"
    wrong = [
        names[name]
        for name, damaged in is_damaged.items()
        if (found[name].check == "failed") != damaged
    ]
    assert not wrong
    assert all(found[name].failed_check for name, damaged in is_damaged.items() if damaged)
    assert found[LATEST].rows == 3


async def rescanned() -> list[BackupSummary]:
    await rescan(access(get_settings()))
    return await list_backups(access(get_settings()), warn)


def is_hostile(one: Forged, values: tuple[str, ...]) -> bool:
    """Whether the backup has a hostile value, or a manifest of another shape."""
    return one.what.endswith(values) or ": " not in one.what


def error_of(path: Path) -> BackupError | None:
    """The error with which opening the backup is refused; None if it can be opened."""
    try:
        with LocalFile(path) as source:
            Backup.open(source)
    except BackupError as error:
        return error
    return None


def is_whole(path: Path) -> bool:
    return error_of(path) is None


@pytest.mark.rest
async def test_the_tasks_and_copies_leave_forged_backups_where_they_are(world: World) -> None:
    """Drills, retention, uploads and downloads do not move or delete a forged backup."""
    before, files = await world.contents(), world.files()
    settings, newest = get_settings(), world.folder / "backup_20260330_120000.backup.gz"
    elsewhere = world.root / "elsewhere" / FORGED
    for one in list(all_of(world))[:: 7 if ALL else 21]:
        one.write(newest)
        await refused(one.what, check_by_restoring(access(settings), "latest"))
        with clock.moved(NOW):
            planned = await prune_plans(access(settings))
            assert not [name async for name in delete_old(access(settings), planned)], one.what
        assert planned[0].decision.doubt or is_whole(newest), one.what
        copy = world.root / "elsewhere" / newest.name
        await refused(one.what, upload(access(settings), newest.name))
        assert not copy.exists() or is_whole(newest), one.what
        copy.unlink(missing_ok=True)
        newest.rename(elsewhere)
        if not await refused(one.what, download(access(settings), FORGED)):
            verified(world.folder / FORGED)
            (world.folder / FORGED).unlink()
        elsewhere.unlink()
        assert world.files() == files, one.what
    assert await world.contents() == before


def verified(path: Path) -> None:
    with LocalFile(path) as source:
        verify(source, Stop())


def test_the_output_about_forged_backups_is_short_and_has_no_control_characters(
    world: World, batch: Batch
) -> None:
    """Names in a backup that can be opened may hold any text that a database allows."""
    path, sound = world.folder / FORGED, str(world.folder / LATEST)
    for one in share_of(world):
        one.write(path)
        if not is_hostile(one, LOUD) or not is_whole(path):
            continue
        for words in (
            ("show", str(path)),
            ("verify", str(path)),
            ("diff", str(path)),
            ("diff", sound, str(path)),
            ("list",),
            ("restore", str(path), "--dry-run"),
        ):
            done = batch("backup", *words)
            assert re.fullmatch(r"(batch: .+\n)?", done.err), (one.what, words, done.err)
            assert done.code in ((2, 3) if done.err else (0,)), (one.what, words)
            assert len(done.out) < 400_000 and len(done.err) < 4_100, (one.what, words)
            assert all(char.isprintable() or char == "\n" for char in done.out + done.err), (
                one.what,
                words,
            )


async def test_a_file_that_is_not_regular_is_no_backup_whatever_its_name(
    world: World, batch: Batch, tmp_path: Path
) -> None:
    """No command waits for a FIFO, or follows a link in the folder, which may lead to a file of
    another user.
    """
    number = iter(range(20))
    outside = forged.sound(tmp_path / "outside.gz", world.kind, world.database)
    strange = forged.strange_files(
        world.folder, lambda: f"backup_20260330_1200{next(number):02}.backup.gz", outside
    )
    assert [summary.name for summary in await list_backups(access(get_settings()), warn)] == [
        LATEST
    ]
    for path in strange:
        for text in (path.name, str(path)):
            follows = text == str(path) and path.is_symlink() and path.resolve() == outside
            done = await refused(text, describe_backup(access(get_settings()), text, warn))
            assert (done is None) == follows, (text, done)
            assert (
                follows
                or "regular file" in str(done)
                or "can't be read" in str(done)
                or "no backup" in str(done)
            )
    assert [summary.name for summary in await list_backups(access(get_settings()), warn)] == [
        LATEST
    ]


def test_an_invalid_file_name_is_refused_with_the_reason(world: World, batch: Batch) -> None:
    for text in ("x" * 5_000, f"/tmp/{'x' * 5_000}", f"./{'y/' * 3_000}z", "s3://" + "b" * 5_000):
        for command in ("show", "verify", "diff", "download"):
            done = batch("backup", command, text)
            assert done.code in (2, 3) and re.fullmatch(r"batch: .+\n", done.err), (
                text[:20],
                command,
                done.err,
            )
            assert len(done.err) < 700 and "output" not in done.err, (text[:20], command, done.err)


CHILD = """
import ctypes, gc, json, re, sys
from batch_system import cli, config
for words in json.loads(sys.stdin.read()):
    sys.argv = ["batch", "backup", *words]
    config.forget_settings()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what the command before has freed
    open("/proc/self/clear_refs", "w").write("5")  # reset the peak of the process's memory
    try:
        cli.main()
    except SystemExit as exited:
        code = exited.code
    sys.stdout.flush()
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())
    print(json.dumps([words, code, int(peak[1]) // 1024]), file=sys.stderr, flush=True)
"""


def bombs_of(kind: str) -> list[tuple[str, str]]:
    return [(kind, what) for what in forged.bombs(kind, Path()) if ALL or what in SOME_BOMBS[kind]]


@pytest.mark.rest
@pytest.mark.parametrize(
    ("world", "what"), [*bombs_of("sqlite"), *bombs_of("postgresql")], indirect=["world"]
)
def test_a_small_forged_file_fills_neither_memory_nor_the_disk_nor_the_screen(
    world: World, what: str
) -> None:
    """One process executes every command on it. The memory and disk space of each command are
    measured.

    The comparison of the file with itself takes most, and is the last one, because the process
    keeps some of that.
    """
    path, sound = world.root / "forged" / FORGED, world.folder / LATEST
    path.parent.mkdir()
    forged.bombs(world.kind, world.database)[what](path)
    os.link(path, world.folder / FORGED)
    commands = (
        ("list",),
        ("show", str(path)),
        ("show", str(path), "--json"),
        ("verify", str(path)),
        ("diff", str(path)),
        ("diff", str(sound), str(path)),
        ("restore", str(path), "--dry-run"),
        *((("verify", "--restore", str(path)), ("diff", str(path), str(path))) if ALL else ()),
    )
    files = world.files()
    done = subprocess.run(
        (sys.executable, "-c", CHILD), input=json.dumps(commands).encode(), capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, timeout=600,
    )  # fmt: skip
    assert world.files() == files
    told = [line for line in done.stderr.decode().splitlines() if line.startswith("[")]
    figures = [json.loads(line) for line in told]
    assert len(figures) == len(commands), done.stderr.decode()[-2_000:]
    if ALL:
        print(f"\n{path.stat().st_size:,} bytes; printed {len(done.stdout):,}")
        print(
            "\n".join(
                f"  {peak:4} MB  {code or 0}  {' '.join(words)}" for words, code, peak in figures
            )
        )
    assert max(peak for _, _, peak in figures) < MOST_MEGABYTES, [
        (w[0], c, p) for w, c, p in figures
    ]
    assert len(done.stdout) < 25_000_000
    assert len(done.stderr.splitlines()) - len(told) <= len(commands), done.stderr.decode()
