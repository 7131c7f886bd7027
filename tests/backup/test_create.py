"""Backups in a process of their own. A lock on a table holds that process where a test wants to
look at it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from batch_system import clock
from batch_system.backup import create_backup
from batch_system.backup.file.progress import BackupProgress
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.file.selection import Selection
from batch_system.backup.file.verify import verify
from batch_system.backup.file.writer import Archive
from batch_system.backup.making import create, worker
from batch_system.backup.making.request import BackupRequest
from batch_system.concurrency.stoppable import Stop
from batch_system.errors import BackupError
from tests.backup.contents import connected, copies, execute, is_written, make_sqlite, opened, until
from tests.backup.here import make_backups_here
from tests.processes import suspend

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("in_a_process")

SYNC = """
from pathlib import Path
from batch_system.backup import create_backup_sync

print(create_backup_sync(Path("backups")))
"""


def workers(parent: int | None = None) -> list[int]:
    """The worker processes of this process, or of `parent`."""
    pid = parent or os.getpid()
    try:
        listed = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except FileNotFoundError:
        return []
    return [
        int(child)
        for child in " ".join(listed).split()
        if "batch_system.backup.making.worker" in command(int(child))
    ]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def stat_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def alive(pid: int) -> bool:
    try:
        return stat_of(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@asynccontextmanager
async def held(database: str) -> AsyncIterator[None]:
    """A backup that begins in the block waits for a lock."""
    async with connected(database) as connection, connection.transaction():
        await connection.execute("LOCK t")
        yield


async def it_waits(database: str) -> None:
    async def waits() -> bool:
        async with connected(database) as connection:
            return bool(
                await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted")
            )

    await until(waits)


@pytest.fixture
async def table(database: str) -> str:
    await execute(database, "CREATE TABLE t AS SELECT 1 AS id")
    return database


async def test_a_backup_is_made_by_a_process_of_low_priority_whose_command_has_no_password(
    database: str, table: str, tmp_path: Path, use_database: Callable[[str], None]
) -> None:
    use_database(
        make_url(database).set(password="very-secret").render_as_string(hide_password=False)
    )
    async with held(table):
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await it_waits(table)
        (pid,) = workers()
        assert stat_of(pid)[16] == str(min(os.nice(0) + 10, 19)), "nice"
        assert database.rpartition("/")[0] not in command(pid) and "secret" not in command(pid)
    path = await backup
    assert copies(path) == {"public.t": b"1\n"}
    assert not alive(pid)
    with LocalFile(path) as file:
        assert verify(file, Stop()).rows == 1


@pytest.mark.rest
async def test_a_sqlite_backup_by_a_process_tells_its_progress(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db, megabytes=1)
    seen: list[BackupProgress] = []
    backup = await create_backup(tmp_path / "backups", on_progress=seen.append)
    await asyncio.sleep(0)
    assert list(dict.fromkeys(progress.stage for progress in seen)) == [
        "copying",
        "packing",
        "verifying",
    ]
    with opened(backup) as copy:
        assert copy.execute("SELECT count(*) FROM users").fetchone() == (1,)


@pytest.mark.parametrize("executable", [None, "", "no-python"])
async def test_an_error_says_that_no_process_can_be_started_and_nothing_is_left(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(BackupError, match="no process could be started for it"):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


async def test_an_error_of_the_other_process_arrives_as_it_was_raised(
    app_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackupError) as there:
        await create_backup(tmp_path / "backups")
    make_backups_here(monkeypatch)
    with pytest.raises(BackupError) as here:
        await create_backup(tmp_path / "backups")
    assert (
        there.value.message == here.value.message
        and "there is no database at" in here.value.message
    )
    assert list((tmp_path / "backups").iterdir()) == []


class Faulty(Archive):
    """A file on a disk that does not keep the bytes that were written."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with self.path.open("r+b") as file:
            file.seek(-2000, os.SEEK_END)
            file.write(bytes(8))


async def test_a_file_that_cannot_be_read_back_never_becomes_a_backup(
    app_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_backups_here(monkeypatch)
    make_sqlite(app_db, megabytes=1)
    monkeypatch.setattr(worker, "Archive", Faulty)
    with pytest.raises(
        BackupError,
        match=r"no backup was made in .* the new file could not be verified "
        r".*The disk may be faulty",
    ):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


async def test_a_folder_that_cannot_be_written_is_noticed_before_a_process_is_started(
    app_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sqlite(app_db)
    monkeypatch.setattr(create, "COMMAND", ("-c", "raise SystemExit('it was started')"))
    with pytest.raises(
        BackupError, match=r"no backup was made in /proc/self: .*BACKUP_DIR to another"
    ):
        await create_backup(Path("/proc/self"))


async def test_a_cancel_ends_the_process_and_leaves_nothing(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "KILL_AFTER_SECONDS", 60.0)
    async with held(table):
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await it_waits(table)
        (pid,) = workers()
        backup.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await backup
        assert not alive(pid)
        assert list((tmp_path / "backups").iterdir()) == []


async def test_a_process_that_does_not_end_after_a_cancel_is_killed(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "KILL_AFTER_SECONDS", 0.05)
    async with held(table):
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await it_waits(table)
        suspend(workers()[0])
        backup.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await backup
        assert list((tmp_path / "backups").iterdir()) == []


@pytest.mark.rest
async def test_a_stop_signal_to_the_whole_service_does_not_end_a_backup_that_may_still_be_finished(
    table: str, tmp_path: Path
) -> None:
    async with held(table):
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await it_waits(table)
        for name in (signal.SIGTERM, signal.SIGINT):
            os.kill(workers()[0], name)
    assert copies(await backup) == {"public.t": b"1\n"}


async def test_a_process_that_is_killed_leaves_nothing_and_the_error_says_so(
    table: str, tmp_path: Path
) -> None:
    async with held(table):
        backup = asyncio.create_task(create_backup(tmp_path / "backups"))
        await it_waits(table)
        os.kill(workers()[0], signal.SIGKILL)
        with pytest.raises(
            BackupError,
            match=r"no backup was made in .*backups: its process was killed \(SIGKILL\)",
        ):
            await backup
    assert list((tmp_path / "backups").iterdir()) == []


async def test_a_process_that_is_killed_leaves_no_copy_of_a_sqlite_database(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db, megabytes=40)
    backup = asyncio.create_task(create_backup(tmp_path / "backups"))

    async def it_copies() -> bool:
        return is_written(tmp_path / "backups", ".backup_*.copy.*")

    await until(it_copies)
    os.kill(workers()[0], signal.SIGKILL)
    with pytest.raises(BackupError, match="SIGKILL"):
        await backup
    assert list((tmp_path / "backups").iterdir()) == []


async def test_a_process_that_ends_without_a_result_made_no_backup(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "COMMAND", ("-c", "raise SystemExit(3)"))
    with pytest.raises(
        BackupError, match=r"its process ended with status 3: look at its output on stderr"
    ):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


async def test_a_process_that_ends_before_it_reads_its_request_is_not_reported_as_a_disk_error(
    app_db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sqlite(app_db)
    monkeypatch.setattr(create, "COMMAND", ("-c", "raise SystemExit(3)"))
    start = create._start

    def ended(partial: Path) -> subprocess.Popen[bytes]:
        started = start(partial)
        started.wait()
        return started

    monkeypatch.setattr(create, "_start", ended)
    with pytest.raises(
        BackupError, match=r"its process ended with status 3: look at its output on stderr"
    ):
        await create_backup(tmp_path / "backups")


@pytest.mark.rest
async def test_when_the_caller_is_killed_the_worker_removes_its_files(
    table: str, app_db: Path, tmp_path: Path
) -> None:
    async with held(table):
        ordering = subprocess.Popen([sys.executable, "-c", SYNC], env=environment())
        await it_waits(table)
        (pid,) = workers(ordering.pid)
        assert list((tmp_path / "backups").iterdir())
        ordering.kill()
        ordering.wait()

        async def it_is_gone() -> bool:
            return not alive(pid)

        await until(it_is_gone)
        assert list((tmp_path / "backups").iterdir()) == []


@pytest.mark.rest
async def test_a_worker_that_reads_its_request_after_the_death_of_its_caller_removes_its_files(
    app_db: Path, tmp_path: Path
) -> None:
    make_sqlite(app_db)
    partial = tmp_path / ".backup_20260329_120000.partial"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for kind, status in (("sqlite", 0), ("of a kind that makes it fail", 1)):
        partial.touch()
        request = BackupRequest(kind, str(app_db), "", clock.now(), Selection())
        line = json.dumps({**json.loads(request.as_json(partial)), "by": gone.pid}).encode() + b"\n"
        done = subprocess.run([sys.executable, *create.COMMAND], input=line, capture_output=True)
        assert done.returncode == status
        assert not list(tmp_path.glob(".backup_*"))


@pytest.mark.rest
async def test_the_files_of_a_killed_caller_and_worker_are_removed_a_day_later(
    table: str, tmp_path: Path
) -> None:
    async with held(table):
        ordering = subprocess.Popen([sys.executable, "-c", SYNC], env=environment())
        await it_waits(table)
        (pid,) = workers(ordering.pid)
        suspend(pid)
        ordering.kill()
        ordering.wait()
        os.kill(pid, signal.SIGKILL)
    (left,) = (tmp_path / "backups").iterdir()
    assert left.suffix == ".partial"
    a_day_ago = clock.now().timestamp() - 25 * 3600
    os.utime(left, (a_day_ago, a_day_ago))
    backup = await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == [backup]


@pytest.mark.rest
def test_a_script_needs_no_event_loop(app_db: Path, tmp_path: Path) -> None:
    make_sqlite(app_db)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SYNC],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    with opened(Path(done.stdout.strip())) as copy:
        assert copy.execute("SELECT count(*) FROM users").fetchone() == (1,)


def test_the_worker_imports_no_module_of_the_service_that_it_does_not_need() -> None:
    code = (
        "import sys, batch_system.backup.making.worker; print(sorted({'sqlalchemy', 'starlette'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_process_of_our_own_imports_the_package_from_the_folder_that_it_is_in() -> None:
    assert (Path(create.COMMAND[-1]) / "batch_system" / "backup").is_dir()
