"""Pins: small files beside the backups in each place, which keep them from being pruned."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batch_system import clock
from batch_system.backup.places import pins
from batch_system.backup.places.pins import Pin
from batch_system.backup.places.place import FOLDER, Folder, Places
from batch_system.backup.places.s3 import Objects
from batch_system.batch.ledger import backups
from batch_system.config import forget_settings, get_settings
from batch_system.errors import BackupError, DatabaseError
from batch_system.operations.backups.copies import download, upload
from batch_system.operations.backups.delete import delete_old, prune_plans
from batch_system.operations.backups.details import describe_backup
from batch_system.operations.backups.pins import PinChange, pin, unpin
from tests.asking import access
from tests.backup.contents import HEADER, forge, make_archive
from tests.backup.s3 import Bucket, bucket, refusing, s3_server

__all__ = ["bucket", "s3_server"]

OLD, NEW = "backup_20251101_020000.backup.gz", "backup_20251125_020000.backup.gz"
NOW = datetime(2025, 11, 26, 2, 0, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path, settings: Callable[..., None]) -> Path:
    """A folder with two backups, of which the older one is old enough to be deleted."""
    folder = tmp_path / "backups"
    folder.mkdir()
    make_archive(folder / OLD)
    make_archive(folder / NEW)
    settings(BACKUP_KEEP_LAST="1", BACKUP_RETENTION_DAYS="1")
    return folder


@pytest.fixture
def in_ledger(ledger_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty ledger, of each kind of database, separate from the application's
    database.
    """
    monkeypatch.setenv("LEDGER_URL", ledger_url)
    forget_settings()
    return ledger_url


async def pruned() -> list[str]:
    settings = get_settings()
    with clock.moved(NOW):
        return [
            one async for one in delete_old(access(settings), await prune_plans(access(settings)))
        ]


def pins_in(bucket: Bucket) -> set[str]:
    names = bucket.keys()
    return {Path(key).name for key in names if key.endswith(".pin")}


async def test_a_pin_is_written_beside_the_backup_in_each_place_and_removed_from_each(
    folder: Path, bucket: Bucket
) -> None:
    await upload(access(get_settings()), OLD)
    with clock.moved(NOW):
        assert await pin(access(get_settings()), OLD, "ann") == PinChange(backup=OLD, changed=True)
        assert await pin(access(get_settings()), OLD, "bob") == PinChange(backup=OLD, changed=False)
    told = json.loads((folder / f"{OLD}.pin").read_text())
    assert told == {"by": "ann", "at": "2025-11-26T02:00:00+00:00"} and pins_in(bucket) == {
        f"{OLD}.pin"
    }
    assert (folder / f"{OLD}.pin").stat().st_mode & 0o777 == 0o600
    assert await pruned() == []
    assert await unpin(access(get_settings()), OLD) == PinChange(backup=OLD, changed=True)
    assert not list(folder.glob("*.pin")) and pins_in(bucket) == set()
    assert await pruned() == [f"backups/{OLD}"]


async def test_a_pin_is_copied_with_its_backup_and_before_it(
    folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a prune on another machine never sees a copy without its pin."""
    settings = get_settings()
    pins.put(Folder(folder), OLD, Pin("ann", NOW))
    put, there = Objects.put, []
    monkeypatch.setattr(Objects, "put", lambda *given: (there.extend(bucket.keys()), put(*given)))
    await upload(access(settings), OLD)
    assert there == [f"shop/db/{OLD}.pin"]
    shutil.rmtree(folder)
    await download(access(settings), OLD)
    assert pins.read(Folder(folder), OLD) == Pin("ann", NOW)


async def test_an_unreachable_place_is_reported_and_the_backup_in_the_other_place_is_pinned(
    folder: Path, bucket: Bucket
) -> None:
    await upload(access(get_settings()), OLD)
    with refusing(403, "AccessDenied") as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        forget_settings()
        with pytest.raises(
            BackupError,
            match=rf"{OLD} is pinned in one place only: .*refuses the keys.*do it again",
        ):
            await pin(access(get_settings()), OLD, "ann")
        with pytest.raises(
            BackupError, match=rf"{OLD} is unpinned in one place only: .*refuses the keys"
        ):
            await unpin(access(get_settings()), OLD)
    forget_settings()
    pins.put(Folder(folder), OLD, Pin())
    assert await pruned() == [], "what is pinned in one place is pinned in both"


async def test_a_backup_that_is_pinned_just_before_its_deletion_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pin appears after the places were listed, and before the deletion."""
    settings = get_settings()
    with clock.moved(NOW):
        planned = await prune_plans(access(settings))
        assert [plan.decision.going for plan in planned] == [[OLD]]
        pins.put(Folder(folder), OLD, Pin("ann", NOW))
        assert [one async for one in delete_old(access(settings), planned)] == [] and (
            folder / OLD
        ).exists()


async def test_a_backup_that_is_deleted_while_it_is_pinned_is_not_reported_as_pinned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Folder.write

    def and_it_goes(self: Folder, name: str, data: bytes) -> bool:
        (self.path / OLD).unlink()
        return write(self, name, data)

    monkeypatch.setattr(Folder, "write", and_it_goes)
    with pytest.raises(
        BackupError, match=f"{OLD} is not pinned: backups/{OLD} was deleted meanwhile"
    ):
        await pin(access(get_settings()), OLD, "ann")


HOSTILE = [
    b"",
    b"{",
    b"[" * 4096,
    b'{"by": 1, "at": 2}',
    b'{"by": null, "at": "yesterday"}',
    b'{"by": ["x"], "at": "0001-01-01T00:00:00+14:00"}',
    b'{"by": "' + b"x" * 10_000_000 + b'"}',
    b"\xff\x00" * 100,
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
async def test_a_pin_pins_whatever_it_holds_and_its_content_is_only_displayed(
    folder: Path, content: bytes
) -> None:
    (folder / f"{OLD}.pin").write_bytes(content)
    assert pins.read(Folder(folder), OLD) == Pin()
    about, _ = await describe_backup(access(get_settings()), OLD, print)
    assert about.pinned == "yes" and about.pinned_by is None
    assert await pruned() == []


async def test_only_the_printable_characters_of_a_name_in_a_pin_are_displayed(folder: Path) -> None:
    by = "\x1b[2Jann\u202e\ud800" + "x" * 200
    (folder / f"{OLD}.pin").write_text(json.dumps({"by": by, "at": "2025-11-26T02:00:00+00:00"}))
    about, _ = await describe_backup(access(get_settings()), OLD, print)
    assert about.pinned_by == "?[2Jann??" + "x" * 91 and about.pinned == NOW


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        os.mkdir,
        lambda path: os.symlink("/etc/passwd", path),
        lambda path: os.symlink("no", path),
    ],
)
async def test_a_pin_of_any_file_type_pins(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / f"{OLD}.pin")
    assert await pruned() == []
    assert pins.read(Folder(folder), OLD) == Pin()


async def test_a_pin_in_a_bucket_is_read_up_to_a_bound(folder: Path, bucket: Bucket) -> None:
    await upload(access(get_settings()), OLD)
    bucket.put(f"shop/db/{OLD}.pin", b"[" * 10_000)
    _, elsewhere = Places.of(get_settings()).all()
    assert len(elsewhere.read(f"{OLD}.pin", 4097)) == 4097 and pins.read(elsewhere, OLD) == Pin()
    assert await pruned() == []


async def test_a_pin_whose_backup_is_gone_is_removed_a_day_later(
    folder: Path, bucket: Bucket
) -> None:
    lost, others = "backup_20250101_000000.backup.gz.pin", "notes.pin"
    for name in (lost, others):
        (folder / name).touch()
        bucket.put(f"shop/db/{name}", b"")
    for age, left in ((timedelta(hours=23), {lost, others}), (timedelta(hours=25), {others})):
        with clock.moved(datetime.now(UTC) + age):
            async for _ in delete_old(
                access(get_settings()), await prune_plans(access(get_settings()))
            ):
                pass
        assert {path.name for path in folder.glob("*.pin")} == left
        assert pins_in(bucket) == left


async def test_nothing_is_deleted_while_the_ledger_is_unreachable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER_URL", "postgresql://bob@127.0.0.1:1/ledger")
    forget_settings()
    with pytest.raises(DatabaseError):
        await pruned()
    assert (folder / OLD).exists()


async def test_a_place_unknown_to_the_ledger_is_read_and_recorded_before_anything_is_deleted(
    in_ledger: str, folder: Path
) -> None:
    broken = "backup_20251110_020000.backup.gz"
    (folder / broken).write_bytes((folder / NEW).read_bytes()[:-1])
    settings = get_settings()
    with clock.moved(NOW):
        planned = await prune_plans(access(settings))
        known_of = await access(settings).records()
        assert {name: (row["rows"], backups.state(row)) for (_, name), row in known_of.items()} == {
            NEW: (6, "not verified"),
            OLD: (6, "not verified"),
            broken: (None, "failed"),
        }
        assert planned[0].decision.too_many == "2 of 3 would go at once"
        assert [one async for one in delete_old(access(settings), planned)] == []


async def test_a_backup_of_a_newer_format_is_kept_and_not_recorded(
    in_ledger: str, folder: Path
) -> None:
    """A newer version made the backup, and then this version was installed again."""
    header = {**HEADER, "format": 2, "kind": "postgresql", "taken_at": "2025-11-01T02:00:00+00:00"}
    forge(folder / OLD, [("header.json", json.dumps(header).encode())])
    with clock.moved(NOW):
        (plan,) = await prune_plans(access(get_settings()))
    assert {one.name: one.why for one in plan.decision.verdicts} == {
        NEW: "the newest",
        OLD: "can't be read",
    }
    assert (FOLDER, OLD) not in await access(get_settings()).records()
