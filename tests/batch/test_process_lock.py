"""The locked files of nodes, in a folder that other users of the machine write to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.nodes import process_lock
from batch_system.batch.nodes.process_lock import ProcessLock, file_of, is_gone
from tests.users import ARE_TWO, OTHER, OWN, WHO, shared_folder, user

POSTGRESQL = "postgresql+asyncpg://somewhere/ledger"
LONG_AGO = 40 * 86_400

Put = Callable[[Path], None]


@pytest.fixture(params=[WHO])
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, which all users share."""
    with shared_folder() as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        yield folder


def aged(*paths: Path) -> None:
    at = clock.now().timestamp() - LONG_AGO
    for path in paths:
        os.utime(path, (at, at), follow_symlinks=False)


def dead_file(folder: Path) -> Path:
    """The file that a killed process of this user has left."""
    node = new_id()
    ProcessLock(folder, node)._release()
    assert is_gone(folder, node)
    return file_of(folder, node)


def node_of(path: Path) -> str:
    return path.name.removeprefix(process_lock.PREFIX)


SQUATS: dict[str, Put] = {
    "folder": lambda path: path.mkdir(mode=0o755),
    "link to a folder": lambda path: path.symlink_to(
        path.parent / "elsewhere", target_is_directory=True
    ),
    "link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
    "file": lambda path: path.write_text("mine"),
    "FIFO": lambda path: os.mkfifo(path, 0o666),
}


@pytest.mark.parametrize("squat", SQUATS)
def test_files_of_other_users_neither_stop_a_node_nor_are_deleted(
    shared: Path, squat: str, caplog: pytest.LogCaptureFixture
) -> None:
    with user(OWN):
        (shared / "elsewhere").mkdir(mode=0o755)
        (shared / "elsewhere" / new_id()).touch(mode=0o600)
        aged(*(shared / "elsewhere").iterdir())
    with user(OTHER):
        SQUATS[squat](shared / f"batch-nodes-{OWN}")
    before = sorted(shared.rglob("*"))
    node = new_id()
    with user(OWN), caplog.at_level(logging.WARNING, "batch_system.batch"):
        own = ProcessLock(process_lock.folder_of(POSTGRESQL), node)
        assert not is_gone(process_lock.folder_of(POSTGRESQL), node)
        own._release()
        assert is_gone(process_lock.folder_of(POSTGRESQL), node)
        process_lock.remove_if_gone(process_lock.folder_of(POSTGRESQL), node)
    assert sorted(shared.rglob("*")) == before
    assert caplog.messages == []


def test_only_a_file_that_names_its_node_proves_that_the_node_is_dead(shared: Path) -> None:
    """If a linked or renamed file counted, the runs of a living node would be executed twice."""
    with user(OWN):
        dead = dead_file(shared)
        renamed, linked, pointed = (file_of(shared, new_id()) for _ in range(3))
        os.link(dead, linked)
        pointed.symlink_to(dead)
        os.rename(dead_file(shared), renamed)
        for path in (renamed, linked, pointed):
            assert not is_gone(shared, node_of(path))
            process_lock.remove_if_gone(shared, node_of(path))
            assert path.is_symlink() or path.exists()
        assert is_gone(shared, node_of(dead))


HOSTILE: dict[str, Put] = {
    "a file that names it": lambda path: path.write_text(node_of(path)) and None,
    "a file of other bytes": lambda path: path.write_bytes(b"\xff" * 100) and None,
    "a FIFO": lambda path: os.mkfifo(path, 0o666),
    "a folder": lambda path: path.mkdir(),
    "a link to somebody's file": lambda path: path.symlink_to(path.parent / "somebody's"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_foreign_file_with_the_name_of_a_node_is_ignored_and_kept(
    shared: Path, what: str
) -> None:
    path = file_of(shared, new_id())
    with user(OWN):
        (shared / "somebody's").write_text(node_of(path))
        aged(shared / "somebody's")
    with user(OTHER):
        HOSTILE[what](path)
        aged(path)
    before = sorted(shared.iterdir())
    with user(OWN):
        # One user's file that names a node is that node's.
        if ARE_TWO or what != "a file that names it":
            assert not is_gone(shared, node_of(path))
            ProcessLock(shared, new_id()).remove()
    assert sorted(shared.iterdir()) == before


@pytest.mark.parametrize("node", ["", "../elsewhere", "a\0b", "x" * 300, "0" * 36])
def test_an_invalid_node_id_names_no_file(shared: Path, node: str) -> None:
    assert not is_gone(shared, node)
    process_lock.remove_if_gone(shared, node)


def test_only_old_files_of_dead_nodes_are_removed(shared: Path) -> None:
    with user(OWN):
        old, young = dead_file(shared), dead_file(shared)
        aged(old)
        living = ProcessLock(shared, node := new_id())
        aged(file_of(shared, node))
        ProcessLock(shared, new_id()).remove()
        assert not old.exists() and young.exists() and file_of(shared, node).exists()
        living.remove()


@pytest.mark.parametrize("way", ["no folder", "taken name", "no locks", "closed folder"])
def test_without_a_locked_file_only_the_lease_decides_about_a_node(
    shared: Path, way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, folder = new_id(), shared / "folder"
    with user(OTHER):
        if way != "no folder":
            folder.mkdir()
        folder.chmod(0o777) if way in ("taken name", "no locks") else None
        if way == "taken name":
            file_of(folder, node).write_text(node)
        if way == "closed folder":
            folder.chmod(0o555)
    if way == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    with user(OWN), caplog.at_level(logging.WARNING, "batch_system.batch"):
        own = ProcessLock(folder, node)
    assert f"can't lock a file in the folder {folder}" in caplog.text and "lease" in caplog.text
    own.remove()
    left = list(folder.iterdir()) if folder.exists() else []
    assert left == ([file_of(folder, node)] if way == "taken name" else [])


def no_locks(file: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_node_starts_without_a_folder_for_temporary_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    ProcessLock(process_lock.folder_of(POSTGRESQL), new_id()).remove()


def test_the_nodes_of_an_sqlite_ledger_have_their_files_beside_it(tmp_path: Path) -> None:
    assert process_lock.folder_of(f"sqlite+aiosqlite:///{tmp_path}/ledger.db") == tmp_path
