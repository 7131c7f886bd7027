"""Backups in folders that other users write to: files of other users stop no backup, and are not
changed.
"""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.backup import create_backup_sync
from batch_system.backup.file.reader import LocalFile
from batch_system.backup.file.verify import verify
from batch_system.backup.places.place import Folder, nothing
from batch_system.backup.restoring.scratch import restore_into_scratch
from batch_system.concurrency.stoppable import Stop
from tests.backup.contents import make_sqlite
from tests.users import ARE_TWO, OTHER, OWN, WHO, shared_folder, user

NOON = datetime(2026, 3, 29, 12, tzinfo=UTC)
LONG_AGO = NOON - timedelta(days=40)
PATIENCE_SECONDS = 5.0

Put = Callable[[Path], object]
Seen = tuple[int, int, int]

SQUATS: dict[str, Put] = {
    "file": lambda path: path.write_text("mine"),
    "folder": lambda path: path.mkdir(),
    "FIFO": lambda path: (os.mkfifo(path), path.chmod(0o666)),
    "link to a file": lambda path: path.symlink_to(path.parent / "own/precious"),
    "link to nothing": lambda path: path.symlink_to(path.parent / "own/nothing"),
}
BESIDE = ("", "-journal", "-wal")


class Shared:
    """A folder that all users may write to, in which this user has a folder with a file that must
    not be changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with user(OWN):
            (folder / "own").mkdir(mode=0o700)
            self.precious = folder / "own/precious"
            self.precious.write_text("dear")

    def squat(self, kind: str, *names: str, at: datetime = NOON) -> None:
        """Create files of another user with these names. `at`: their time of modification."""
        with user(OTHER):
            for name in names:
                SQUATS[kind](self.folder / name)
                os.utime(
                    self.folder / name, (at.timestamp(), at.timestamp()), follow_symlinks=False
                )
        os.utime(self.precious, (at.timestamp(), at.timestamp()))

    def assert_untouched(self, before: dict[str, Seen], but: Path | None = None) -> None:
        """If one user plays both roles, a file that looks abandoned is one of its own, and may be
        removed.
        """
        after = self.seen()
        if but is not None:
            after.pop(but.name)
        if ARE_TWO:
            assert after == before
        assert after.items() <= before.items()
        assert self.precious.read_text() == "dear"

    def seen(self) -> dict[str, Seen]:
        """The files of another user in the folder: kind and mode, owner, and size of each."""
        paths = [
            path for path in self.folder.iterdir() if not path.name.startswith(("own", "app.db"))
        ]
        found = {path.name: path.lstat() for path in paths}
        return {name: (seen.st_mode, seen.st_uid, seen.st_size) for name, seen in found.items()}

    @contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """Fail the test, instead of hanging, if a FIFO is opened."""
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            waited = pool.submit(self._release, over)
            try:
                yield
            finally:
                over.set()
            assert not waited.result()

    def _release(self, over: threading.Event) -> bool:
        """Open the other end of a FIFO for a process that waits for it. Returns whether one was
        waiting.
        """
        if over.wait(PATIENCE_SECONDS):
            return False
        while not over.wait(0.05):
            for path in self.folder.iterdir():
                if stat.S_ISFIFO(path.lstat().st_mode):
                    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        return True


@pytest.fixture(params=[WHO])
def shared(
    monkeypatch: pytest.MonkeyPatch, use_database: Callable[[str], None]
) -> Iterator[Shared]:
    with shared_folder() as folder, clock.moved(NOON):
        shared = Shared(folder)
        make_sqlite(folder / "app.db")
        use_database(f"sqlite:///{folder}/app.db")
        # Import everything first: this user may not read the Python files.
        create_backup_sync(folder / "own/first")
        for path in folder.glob("app.db*"):
            os.chown(path, OWN, -1)
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.chdir(folder / "own")
        yield shared


def names_at(instant: datetime) -> list[str]:
    """The names of a backup's files at this instant, without the random parts."""
    name = f".backup_{instant:%Y%m%d_%H%M%S}"
    return [f"{name}.partial", *(f"{name}.copy{more}" for more in BESIDE)]


ABANDONED = (*names_at(LONG_AGO), ".backup_20260218_120000.0123abcd.partial")

squat = pytest.mark.parametrize("kind", SQUATS)


@squat
def test_a_backup_is_made_whatever_files_another_user_has_put_into_its_folder(
    shared: Shared, kind: str
) -> None:
    first, *later = [names_at(NOON + timedelta(seconds=second)) for second in range(3)]
    shared.squat(kind, *first, *(name for names in later for name in names if ".copy" in name))
    before = shared.seen()
    with user(OWN), shared.nothing_waits():
        made = create_backup_sync(shared.folder)
        with LocalFile(made) as file:
            verify(file, Stop())
    assert (stat.S_IMODE(made.stat().st_mode), made.stat().st_uid) == (0o600, OWN)
    shared.assert_untouched(before, but=made)


@squat
def test_abandoned_files_of_another_user_are_kept_and_stop_no_backup(
    shared: Shared, kind: str
) -> None:
    shared.squat(kind, *ABANDONED, at=LONG_AGO)
    before = shared.seen()
    with user(OWN), shared.nothing_waits():
        made = create_backup_sync(shared.folder)
    shared.assert_untouched(before, but=made)


@squat
def test_a_copy_is_made_beside_abandoned_files_of_another_user(shared: Shared, kind: str) -> None:
    shared.squat(kind, *ABANDONED, at=LONG_AGO)
    before = shared.seen()
    with user(OWN), shared.nothing_waits():
        made = create_backup_sync(shared.folder / "own")
        with LocalFile(made) as file:
            Folder(shared.folder).put(file, made.name, Stop(), nothing)
    copy = (shared.folder / made.name).stat()
    assert (stat.S_IMODE(copy.st_mode), copy.st_uid, copy.st_size) == (
        0o600,
        OWN,
        made.stat().st_size,
    )
    shared.assert_untouched(before, but=made)


@squat
def test_a_backup_is_tried_out_beside_the_files_of_another_user(shared: Shared, kind: str) -> None:
    names = [f".20260329_120000_{os.getpid() + number}.restore" for number in range(1, 3)]
    shared.squat(kind, *names, ".restore_20260218_120000_abcdefgh", at=LONG_AGO)
    before = shared.seen()
    with (
        user(OWN),
        shared.nothing_waits(),
        LocalFile(create_backup_sync(shared.folder / "own")) as file,
    ):
        assert asyncio.run(
            restore_into_scratch(file, f"sqlite+aiosqlite:///{shared.folder}/app.db")
        ).rows
    shared.assert_untouched(before)
