"""Restores a backup into an SQLite database: fills a new file, and then copies its pages over those
of the live file.

The schema comes from the live file and from the service's migrations, never from the backup. The
rows of tables that are not restored are copied from the live file once no other connection can
write. SQLite's backup API then writes the new file into the live file, in one transaction: readers
continue with the rows that they see, and if the process is killed, the live file keeps its old
rows.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from sqlalchemy.engine import URL

from batch_system import clock
from batch_system.backup.file.folder import create
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.reader import Backup
from batch_system.backup.postgresql.server import LastCheck
from batch_system.backup.restoring import plan_sqlite
from batch_system.backup.restoring.count import RestoreReport, TableCounts, checked_counts
from batch_system.backup.restoring.plan import RestorePlan
from batch_system.backup.restoring.plan_sqlite import A_TEMPORARY_FILE, SqliteRestore
from batch_system.backup.sqlite.new_file import LIVE, MADE, NewFile, file_settings
from batch_system.backup.sqlite.plain_file import (
    LISTEN_SECONDS,
    Patience,
    explained,
    guard,
    opened,
    unpack,
    workplace,
)
from batch_system.backup.sqlite.structure import Structure
from batch_system.concurrency.stoppable import Stop
from batch_system.database.migrate import History
from batch_system.errors import BackupError

STEP_PAGES = 5000
COPIES = 2
"""How many copies of the rows are in the folder at once: the unpacked file of the backup, and the
new file.
"""


class _RolledBack(Exception):
    """Raised by a dry run instead of committing."""


def plan(
    backup: Backup,
    url: URL,
    stop: Stop,
    *,
    histories: Sequence[History] = (),
    example: Path | None = None,
) -> RestorePlan:
    """Plan a restore; nothing is changed. `example`: as for `run`. Raises BackupError and
    Stopped.
    """
    path = file_of(url)
    with explained(path, stop), tempfile.TemporaryDirectory(prefix="batch-restore-") as folder:
        return _planned(backup, path, example, histories, Path(folder)).plan


def _planned(
    backup: Backup, path: Path, example: Path | None, histories: Sequence[History], folder: Path
) -> SqliteRestore:
    if example is None:
        return plan_sqlite.for_live(backup, path, histories, folder)
    return plan_sqlite.for_copy(backup, path, example, histories, folder)


def file_of(url: URL) -> Path:
    """The database file of a URL, which need not exist. Raises BackupError for a database in
    memory.
    """
    name = url.database or ":memory:"
    if name == ":memory:" or name.startswith("file:"):
        raise BackupError(
            f"can't restore into {name!r}: DATABASE_URL must name a file, as in sqlite:///./app.db"
        )
    path = Path(name)
    if not path.parent.is_dir():
        raise BackupError(
            f"can't restore into {path.absolute()}: make its folder first, or look at DATABASE_URL"
        )
    return path


def run(
    backup: Backup,
    url: URL,
    meter: BackupMeter,
    stop: Stop,
    *,
    dry_run: bool,
    last_check: LastCheck | None,
    folder: Path,
    histories: Sequence[History] = (),
    example: Path | None = None,
) -> RestoreReport:
    """Restore the backup; `dry_run`: change nothing. `folder`: one with room for twice the data, on
    any disk.

    `example`: the file whose tables an empty file gets; None if it gets those of the migrations.
    Raises BackupError and Stopped.
    """
    started, path = clock.monotonic(), file_of(url)
    with workplace(folder) as place, explained(path, stop):
        restore = _planned(backup, path, example, histories, place)
        restore.plan.refuse()
        with _filled(backup, restore, place, meter, stop) as (new, counts):
            if dry_run and not path.exists():
                new.make_views_and_triggers()
            else:
                _Swap(new, restore, path, meter, stop, last_check, dry_run).carry_out()
    plan = restore.plan
    return RestoreReport(
        plan.backup, plan.database, counts, clock.monotonic() - started, dry_run, plan.notes
    )


def try_out(
    backup: Backup,
    application: URL,
    meter: BackupMeter,
    stop: Stop,
    *,
    folder: Path,
    histories: Sequence[History] = (),
) -> RestoreReport:
    """Restore the backup into a new file, and remove the file instead of copying it. Raises
    BackupError and Stopped.
    """
    started = clock.monotonic()
    is_sqlite = application.get_backend_name() == "sqlite"
    live = Path(application.database) if is_sqlite and application.database else None
    with workplace(folder) as place, explained(place, stop):
        restore = plan_sqlite.for_drill(backup, live, histories, place)
        restore.plan.refuse()
        with _filled(backup, restore, place, meter, stop) as (new, counts):
            new.make_views_and_triggers()
    return RestoreReport(
        backup.source.name, A_TEMPORARY_FILE, counts, clock.monotonic() - started, dry_run=True
    )


@contextmanager
def _filled(
    backup: Backup, restore: SqliteRestore, place: Path, meter: BackupMeter, stop: Stop
) -> Iterator[tuple[NewFile, tuple[TableCounts, ...]]]:
    """Make a new file with all tables and the rows of the backup, without the rows that are kept
    from the live file.
    """
    saved = place / "saved.sqlite3"
    unpack(backup, saved, meter, stop, COPIES)
    with NewFile(place / "new.sqlite3", backup, restore.structure, stop) as new:
        new.make_tables(restore.live.settings or _settings_of(saved, backup))
        rows = new.fill(saved, restore.plan.tables, meter)
        counts = checked_counts(backup.source.name, restore.plan.tables, restore.plan.rows, rows)
        if restore.migrated:
            new.keep(MADE, restore.migrated, restore.kept(MADE))
        yield new, counts


def _settings_of(saved: Path, backup: Backup) -> dict[str, int | str]:
    with closing(opened(saved, "immutable=1")) as connection:
        guard(connection, backup.source.size)
        return file_settings(connection)


class _Swap:
    """Copies the pages of the new file over those of the live file, after completing the new
    file.
    """

    def __init__(
        self,
        new: NewFile,
        restore: SqliteRestore,
        path: Path,
        meter: BackupMeter,
        stop: Stop,
        last_check: LastCheck | None,
        dry_run: bool,
    ) -> None:
        self._new = new
        self._restore = restore
        self._path = path
        self._meter = meter
        self._stop = stop
        self._last_check = last_check
        self._dry_run = dry_run
        self._patience = Patience(path, stop)
        self._is_locked = False
        self._left = 0
        self._page_size, self._pages = (
            int(new.connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_size", "page_count")
        )

    def carry_out(self) -> None:
        """Copy the pages in one transaction. Raises BackupError, sqlite3.Error and Stopped."""
        self._meter.begin("restoring", self._pages * self._page_size)
        with suppress(FileExistsError):
            os.close(create(self._path.resolve()))
        with closing(opened(self._path, "mode=rw", LISTEN_SECONDS)) as live, suppress(_RolledBack):
            self._let_readers_go_on(live)
            # The last step commits, so there are at least two.
            pages = max(1, min(STEP_PAGES, self._pages - 1))
            self._new.connection.backup(live, pages=pages, progress=self._step)
            # The restore has been committed, so a failed checkpoint does no harm.
            with suppress(sqlite3.Error):
                live.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _let_readers_go_on(self, live: sqlite3.Connection) -> None:
        """Set WAL mode, as get_db() does. It allows reading the kept tables while the live file is
        locked.
        """
        # It takes effect only in an empty file.
        live.execute(f"PRAGMA page_size = {self._page_size}")
        while True:
            try:
                (mode,) = live.execute("PRAGMA journal_mode = WAL").fetchone()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    raise
                self._patience.again()
                continue
            if mode != "wal":
                raise BackupError(
                    f"nothing was restored into {self._path.absolute()}: its disk does not allow "
                    "SQLite's WAL mode, "
                    "which the service needs. Move the database to a local disk"
                )
            return

    def _step(self, status: int, remaining: int, _: int) -> None:
        if status == sqlite3.SQLITE_DONE:  # the copy has been committed
            return
        self._stop.check()
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            self._patience.again()
            return
        if not self._is_locked:  # after the first step no other connection can write
            self._is_locked = True
            self._complete()
        self._meter.add(max(self._left - remaining, 0) * self._page_size)
        self._left = remaining

    def _complete(self) -> None:
        """Make the last check, and add the kept parts of the live file to the new file. A dry run
        ends here.
        """
        if self._last_check is not None:
            asyncio.run(self._last_check())
        self._refuse_changed_tables()
        live = self._restore.live
        if live.structure.tables:
            kept = self._restore.kept(LIVE)
            self._new.keep(LIVE, self._path, kept)
            restored = [table.name for table in self._restore.plan.tables]
            # Kept rows may refer to row ids that restored tables gave before.
            if set(kept) - live.revisions.keys():
                for name in restored:
                    self._new.go_on_behind(LIVE, name)
            self._new.refuse_orphans(restored)
        self._new.make_views_and_triggers()
        if self._dry_run:
            raise _RolledBack

    def _refuse_changed_tables(self) -> None:
        """Raises BackupError if the schema of the live file has changed since the restore was
        planned.
        """
        with closing(opened(self._path, "mode=rw")) as connection:
            structure = Structure.of(connection)
        if structure.objects != self._restore.live.structure.objects:
            raise BackupError(
                f"nothing was restored into {self._path.absolute()}: another program has changed "
                "its tables meanwhile. End other programs that use it, and try again"
            )
