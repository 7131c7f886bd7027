"""The file of the SQLite ledger: its disk is full, somebody has locked it, it is deleted, or a
reader never ends.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from batch_system.batch.nodes.loop_watchdog import EXIT_CODE
from tests.days.story import MISSED, Story, down, plain
from tests.processes import BATCH

pytestmark = pytest.mark.days


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Story]:
    """One node with the default settings: its two files are in its folder."""
    with Story(tmp_path / "story", {}) as story:
        story.start("a")
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        yield story


def test_another_process_holds_the_write_lock_for_70_seconds(files: Story) -> None:
    with closing(sqlite3.connect(ledger_of(files), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        files.wait(65)
        assert "ledger" in (files.nodes["a"].readiness() or {})
        assert files.nodes["a"].get("/healthz").status_code == 200
        files.wait(5)
    files.check_end()
    files.check_told(down("it does not answer in time"), headline=MISSED)


def test_a_reader_of_the_ledger_never_ends(files: Story) -> None:
    with closing(sqlite3.connect(ledger_of(files), isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM batch_runs").fetchall()
        since = files.now()
        files.wait(120)
        assert len(files.ended_since(since)) == 12
    files.check_end()
    files.check_told()


def test_the_file_is_deleted(files: Story) -> None:
    """What is written to a deleted file is lost, so the process ends, and the next one begins with
    a new ledger.
    """
    for name in list(Path(ledger_of(files)).parent.glob("ledger.db*")):
        name.unlink()
    assert files.nodes["a"].process.wait(60) == EXIT_CODE
    assert "deleted or replaced" in files.nodes["a"].said
    files.began = files.clock()
    files.start("a")
    files.check_end()
    files.check_told()


def test_the_file_is_replaced_by_a_copy(files: Story) -> None:
    path = ledger_of(files)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(f"{path}.copy")) as copy:
        source.backup(copy)
    os.replace(f"{path}.copy", path)
    assert files.nodes["a"].process.wait(60) == EXIT_CODE
    assert "deleted or replaced" in files.nodes["a"].said
    files.start("a")
    files.check_end()
    files.check_told()


def test_the_file_is_damaged(files: Story) -> None:
    path = Path(ledger_of(files))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 8192))
    assert files.nodes["a"].process.wait(120) == EXIT_CODE
    critical = [line for line in files.nodes["a"].said.splitlines() if "[critical" in line]
    assert plain(critical[0]) == (
        "TIME [critical ] ledger: sqlite+aiosqlite:///./ledger.db (DATABASE_URL): database disk "
        "image is malformed: its file is damaged. Stop all services, and move ./ledger.db and the "
        "files beside it away: a service then begins with a new ledger, so tasks fire from then "
        "on, and their history is lost. Backups do not include the ledger; `sqlite3 FILE "
        ".recover` saves what can be read; this process ends with the exit code 70, so that it is "
        "started anew [batch_system.batch]"
    )


SMALL_DISK = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o size=16m small "$0" && shift && exec "$@"',
)


@pytest.mark.parametrize(("seconds", "descriptors"), [(90, 1024), (300, 64)])
def test_the_disk_is_full(tmp_path: Path, seconds: int, descriptors: int) -> None:
    """While it is full nothing fires, and no descriptor is leaked: with few of them HTTP would be
    gone.
    """
    disk = tmp_path / "story/disk"
    url = f"sqlite+aiosqlite:///{disk}/ledger.db"
    with Story(tmp_path / "story", {"LEDGER_URL": url}) as story:
        disk.mkdir()
        limit = ("sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh")
        command = (*SMALL_DISK, str(disk), "-", *limit, *BATCH, "serve", "--port", "0")
        story.start("a", command=command)
        node = story.nodes["a"]
        inside = Path(f"/proc/{node.process.pid}/root") / disk.relative_to("/")
        story.until(lambda: len(story.ended_since(0)) == 12, 30, "all twelve tasks run")
        fill(inside / "ballast")
        story.wait(seconds - 5)
        assert "disk is full" in str(node.readiness())
        assert node.get("/healthz").status_code == 200
        (inside / "ballast").unlink()
        story.prefix = (
            "nsenter",
            "--mount",
            "--target",
            str(node.process.pid),
            f"--wd={story.folder}",
        )
        story.check_end()
        story.check_told(down("its disk is full; make room there"), headline=MISSED)
        lines = [line for line in node.said.splitlines() if "can't be used" in line]
        assert len(lines) < 5, lines


def fill(path: Path) -> None:
    """Write to a file until its disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as ballast:
        while ballast.write(bytes(65_536)):
            pass


def ledger_of(story: Story) -> str:
    (found,) = story.folder.rglob("ledger.db")
    return str(found)
