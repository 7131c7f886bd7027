"""SQLite: a new file with all tables, filled with the rows of a backup, and swapped in for the live one.

Tables are made of the live file's own text and of our migrations, never of the backup's. What is not restored stays:
its rows are copied when nobody else can write any more. SQLite's own backup then writes the new file into the live one,
in one transaction: readers go on with what they see, and a process that is killed on the way leaves the old rows.
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

from service import clock
from service.backup.file.folder import create
from service.backup.file.progress import BackupMeter
from service.backup.file.reader import Backup
from service.backup.postgresql.server import LastCheck
from service.backup.restoring import plan_sqlite
from service.backup.restoring.count import Counted, Report, compared
from service.backup.restoring.plan import Plan
from service.backup.restoring.plan_sqlite import A_TEMPORARY_FILE, Work
from service.backup.sqlite.new_file import LIVE, MADE, NewFile, file_settings
from service.backup.sqlite.plain_file import LISTEN_SECONDS, Patience, explained, guard, opened, unpack, workplace
from service.backup.sqlite.structure import Structure
from service.concurrency.stoppable import Stop
from service.database.migrate import History
from service.errors import BackupError

STEP_PAGES = 5000
COPIES = 2
"""So often do the rows lie in the folder for a while: in the backup's file, and in the new one."""


class _RolledBack(Exception):
    """A dry run has come to where it would commit."""


def plan(backup: Backup, url: URL, stop: Stop, *, histories: Sequence[History] = ()) -> Plan:
    path = file_of(url)
    with explained(path, stop), tempfile.TemporaryDirectory(prefix="batch-restore-") as folder:
        return plan_sqlite.for_live(backup, path, histories, Path(folder)).plan


def file_of(url: URL) -> Path:
    name = url.database or ":memory:"
    if name == ":memory:" or name.startswith("file:"):
        raise BackupError(f"can't restore into {name!r}: DATABASE_URL must name a file, as in sqlite:///./app.db")
    path = Path(name)
    if not path.parent.is_dir():
        raise BackupError(f"can't restore into {path.absolute()}: make its folder first, or look at DATABASE_URL")
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
) -> Report:
    """`folder`: where there is room for twice the data, on whichever disk."""
    started, path = clock.monotonic(), file_of(url)
    with workplace(folder) as place, explained(path, stop):
        work = plan_sqlite.for_live(backup, path, histories, place)
        work.plan.refuse()
        with _filled(backup, work, place, meter, stop) as (new, counted):
            if dry_run and not path.exists():
                new.make_views_and_triggers()
            else:
                _Swap(new, work, path, meter, stop, last_check, dry_run).carry_out()
    made = work.plan
    return Report(made.backup, made.database, counted, clock.monotonic() - started, dry_run, made.notes)


def try_out(
    backup: Backup, application: URL, meter: BackupMeter, stop: Stop, *, folder: Path, histories: Sequence[History] = ()
) -> Report:
    """The same restore into an empty file, which is removed: only the swap is missing. Raises BackupError."""
    started = clock.monotonic()
    is_sqlite = application.get_backend_name() == "sqlite"
    live = Path(application.database) if is_sqlite and application.database else None
    with workplace(folder) as place, explained(place, stop):
        work = plan_sqlite.for_drill(backup, live, histories, place)
        work.plan.refuse()
        with _filled(backup, work, place, meter, stop) as (new, counted):
            new.make_views_and_triggers()
    return Report(backup.source.name, A_TEMPORARY_FILE, counted, clock.monotonic() - started, dry_run=True)


@contextmanager
def _filled(
    backup: Backup, work: Work, place: Path, meter: BackupMeter, stop: Stop
) -> Iterator[tuple[NewFile, tuple[Counted, ...]]]:
    """A new file with all tables, and with all rows but those that are kept of the live file."""
    saved = place / "saved.sqlite3"
    unpack(backup, saved, meter, stop, COPIES)
    with NewFile(place / "new.sqlite3", backup, work.structure, stop) as new:
        new.make_tables(work.live.settings or _settings_of(saved, backup))
        rows = new.fill(saved, work.plan.tables, meter)
        counted = compared(backup.source.name, work.plan.tables, work.plan.rows, rows)
        if work.made:
            new.keep(MADE, work.made, work.kept(MADE))
        yield new, counted


def _settings_of(saved: Path, backup: Backup) -> dict[str, int | str]:
    with closing(opened(saved, "immutable=1")) as connection:
        guard(connection, backup.source.size)
        return file_settings(connection)


class _Swap:
    """The new file's pages over those of the live one, once what is kept was taken from there."""

    def __init__(
        self,
        new: NewFile,
        work: Work,
        path: Path,
        meter: BackupMeter,
        stop: Stop,
        last_check: LastCheck | None,
        dry_run: bool,
    ) -> None:
        self._new = new
        self._work = work
        self._path = path
        self._meter = meter
        self._stop = stop
        self._last_check = last_check
        self._dry_run = dry_run
        self._patience = Patience(path, stop)
        self._is_locked = False
        self._left = 0
        self._page_size, self._pages = (
            int(new.connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("page_size", "page_count")
        )

    def carry_out(self) -> None:
        self._meter.begin("restoring", self._pages * self._page_size)
        with suppress(FileExistsError):
            os.close(create(self._path.resolve()))
        with closing(opened(self._path, "mode=rw", LISTEN_SECONDS)) as live, suppress(_RolledBack):
            self._let_readers_go_on(live)
            # The last step commits, so there are at least two.
            pages = max(1, min(STEP_PAGES, self._pages - 1))
            self._new.connection.backup(live, pages=pages, progress=self._step)
            with suppress(sqlite3.Error):  # the rows are there, whatever becomes of this
                live.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _let_readers_go_on(self, live: sqlite3.Connection) -> None:
        """As get_db() does too. What is kept is read while the live file is locked for writers."""
        live.execute(f"PRAGMA page_size = {self._page_size}")  # of a file that is empty as yet
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
                    f"nothing was restored into {self._path.absolute()}: its disk does not allow SQLite's WAL mode, "
                    "which the service needs. Move the database to a local disk"
                )
            return

    def _step(self, status: int, remaining: int, _: int) -> None:
        if status == sqlite3.SQLITE_DONE:  # it has committed
            return
        self._stop.check()
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            self._patience.again()
            return
        if not self._is_locked:  # from the first step on nobody else can write
            self._is_locked = True
            self._complete()
        self._meter.add(max(self._left - remaining, 0) * self._page_size)
        self._left = remaining

    def _complete(self) -> None:
        if self._last_check is not None:
            asyncio.run(self._last_check())
        self._refuse_others_tables()
        if self._work.live.structure.tables:
            self._new.keep(LIVE, self._path, self._work.kept(LIVE))
            restored = [table.name for table in self._work.plan.tables]
            if set(self._work.kept(LIVE)) - self._work.live.revisions.keys():  # it may refer to numbers that were given
                for name in restored:
                    self._new.go_on_behind(LIVE, name)
            self._new.refuse_orphans(restored)
        self._new.make_views_and_triggers()
        if self._dry_run:
            raise _RolledBack

    def _refuse_others_tables(self) -> None:
        """The new file's tables are those that were there when it was begun."""
        with closing(opened(self._path, "mode=rw")) as connection:
            structure = Structure.of(connection)
        if structure.objects != self._work.live.structure.objects:
            raise BackupError(
                f"nothing was restored into {self._path.absolute()}: somebody has changed its tables meanwhile. End "
                "other programs that use it, and try again"
            )
