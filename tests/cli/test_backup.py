"""`batch backup …` as a person types it: real files, a real ledger, a real bucket."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer.main

from batch_system import clock
from batch_system.cli import backups
from batch_system.cli.examples import EXAMPLES
from batch_system.config import forget_settings, get_settings
from batch_system.database import engine
from batch_system.errors import BackupError
from batch_system.operations.backups.copies import upload, waiting
from batch_system.operations.backups.delete import delete_old, prune_plans
from batch_system.operations.backups.make import check
from batch_system.operations.backups.pins import pin
from tests.asking import access
from tests.backup.contents import make_archive, make_sqlite
from tests.backup.here import make_backups_here
from tests.backup.s3 import SECRET, Bucket, bucket, refusing, s3_server
from tests.commands import Batch, in_this_process, refuses

__all__ = ["bucket", "s3_server"]

OLD, NEW = "backup_20251124_020000.backup.gz", "backup_20251125_020000.backup.gz"
NOW = datetime(2025, 11, 25, 12, 0, 0, tzinfo=UTC)

batch = pytest.fixture(in_this_process)


@pytest.fixture(autouse=True)
def in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    make_backups_here(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two backups that no ledger knows."""
    folder = tmp_path / "backups"
    folder.mkdir()
    make_archive(folder / OLD)
    make_archive(folder / NEW)
    return folder


@pytest.fixture
def ledger(batch: Batch, tmp_path: Path) -> Path:
    """An empty ledger."""
    (tmp_path / "tasks/nothing.py").write_text(
        "from batch_system import BaseTask\n\n\nclass NothingTask(BaseTask):\n"
        "    name = 'nothing'\n    schedule = None\n\n    async def run(self):\n        pass\n"
    )
    assert batch("run", "nothing").code == 0
    return tmp_path / "ledger.db"


@pytest.fixture
def keeping_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that keep the least: backups older than a day are deleted, except the newest."""
    monkeypatch.setenv("BACKUP_KEEP_LAST", "1")
    monkeypatch.setenv("BACKUP_RETENTION_DAYS", "1")
    forget_settings()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def test_a_backup_is_made_checked_listed_and_shown(
    batch: Batch, tmp_path: Path, ledger: Path
) -> None:
    made = batch("backup", "create", "--json")
    assert made.code == 0 and made.json["kind"] == "sqlite" and Path(made.json["backup"]).is_file()
    name = made.json["name"]
    told = batch("backup", "verify")
    assert (told.code, told.err) == (0, "") and f"{name}: 3 rows of 8 tables in " in told.out
    assert told.out.endswith("verified (checksums only)\n")
    (row,) = batch("backup", "list", "--json").json
    assert (row["name"], row["check"], row["where"], row["revision"]) == (
        name,
        "checksums only",
        "folder",
        "app_0004",
    )
    shown = batch("backup", "show", name).out
    assert "app.db (sqlite " in shown and "checksums only" in shown and "alembic_version" in shown
    assert {
        table["table"]: table["rows"]
        for table in batch("backup", "show", "latest", "--json").json["tables"]
    } == {
        **dict.fromkeys(
            (
                "batch_checkpoints",
                "batch_once",
                "batch_quarantine",
                "batch_starts",
                "sessions",
                "users",
            ),
            0,
        ),
        "alembic_version": 1,
        "batch_data_alembic_version": 1,
        "batch_data_windows": 1,
    }


@pytest.mark.first_start
def test_without_a_ledger_all_but_a_rescan_works(
    batch: Batch, folder: Path, tmp_path: Path
) -> None:
    make_sqlite(tmp_path / "app.db")
    assert batch("backup", "create").code == 0
    rows = batch("backup", "list", "--json").json
    assert [(row["check"], row["rows"]) for row in rows[1:]] == [("not verified", None)] * 2
    for words in (("show", OLD), ("verify", OLD), ("prune", "--dry-run"), ("prune",)):
        assert batch("backup", *words).code == 0
    assert batch("backup", "pin", OLD).out == f"{OLD} is pinned\n"
    with clock.moved(NOW + timedelta(days=900)):
        batch(
            "backup",
            "prune",
            BACKUP_KEEP_LAST="1",
            BACKUP_RETENTION_DAYS="1",
            BACKUP_LEAST_SHARE="0",
        )
    assert (folder / OLD).exists() and not (folder / NEW).exists()
    assert batch("backup", "unpin", OLD).out == f"{OLD} is not pinned any more\n"
    refuses(batch("backup", "list", "--rescan"), "there is no ledger yet")
    assert not (tmp_path / "ledger.db").exists()


def test_the_list_says_how_each_was_checked_and_why_it_is_kept(
    batch: Batch, folder: Path, ledger: Path
) -> None:
    make_archive(folder / "backup_20200105_020000.backup.gz")
    make_archive(folder / (broken := "backup_20200105_010000.backup.gz"))
    damage(folder / broken)
    batch("backup", "verify", OLD)
    batch("backup", "pin", OLD)
    refuses(batch("backup", "verify", broken), broken, "is damaged", code=3)
    with clock.moved(NOW):
        listed = batch(
            "backup",
            "list",
            BACKUP_KEEP_WEEKLY="9",
            BACKUP_KEEP_LAST="1",
            BACKUP_RETENTION_DAYS="1",
        )
    lines = [line.split("  ") for line in listed.out.splitlines()]
    table = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert table[0] == ["backup", "check", "size", "rows", "kept", "where"]
    assert [(row[0], row[1], row[-2]) for row in table[1:]] == [
        (NEW, "not verified", "the newest"),
        (OLD, "checksums only", "pinned"),
        ("backup_20200105_020000.backup.gz", "not verified", "weekly"),
        (broken, "failed", "older than 1 day"),
    ]
    (row,) = [row for row in batch("backup", "list", "--json").json if row["name"] == broken]
    assert "is damaged" in row["failed_check"]


def test_a_rescan_keeps_pins_adds_what_is_new_and_drops_what_is_gone(
    batch: Batch, folder: Path, ledger: Path
) -> None:
    batch("backup", "pin", OLD)
    batch("backup", "verify", NEW)
    (folder / NEW).unlink()
    make_archive(folder / (moved := "backup_20251123_020000.backup.gz"))
    rows = batch("backup", "list", "--rescan", "--json").json
    assert [(row["name"], row["pinned"], row["where"]) for row in rows] == [
        (OLD, True, "folder"),
        (moved, False, "folder"),
    ]
    assert asyncio.run(access(get_settings()).records()).keys() == {
        ("folder", OLD),
        ("folder", moved),
    }


def test_a_file_that_only_has_the_name_of_a_backup_is_listed_and_does_not_affect_others(
    batch: Batch, folder: Path, ledger: Path
) -> None:
    (folder / "backup_20251126_020000.backup.gz").write_bytes(b"of somebody else")
    damage(folder / OLD)
    with (folder / OLD).open("r+b") as file:
        file.truncate(900)
    for _ in range(2):
        rows = batch("backup", "list", "--json").json
        assert [row["check"] for row in rows][:2] == ["failed", "not verified"]
        assert rows[0]["failed_check"].endswith("is not a backup of this service")
        rescanned = batch("backup", "list", "--rescan", "--json").json
        assert [row["check"] for row in rescanned] == ["failed", "not verified", "failed"]


def test_a_rescan_that_cannot_look_at_a_place_drops_nothing(
    batch: Batch, folder: Path, ledger: Path, bucket: Bucket
) -> None:
    batch("backup", "upload", NEW)
    (folder / NEW).unlink()
    with refusing(403, "AccessDenied") as port:
        refuses(
            batch("backup", "list", "--rescan", AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}"),
            "may not do that",
            code=3,
        )
        listed = batch("backup", "list")
    assert "what is elsewhere is shown as the ledger knows it" in listed.err
    assert NEW in listed.out and "elsewhere" in listed.out


def test_a_backup_goes_to_the_bucket_and_comes_back(
    batch: Batch, folder: Path, ledger: Path, bucket: Bucket
) -> None:
    data = (folder / NEW).read_bytes()
    up = batch("backup", "upload")
    assert up.code == 0 and f"{bucket.url}/{NEW}: 6 rows of 2 tables" in up.out
    rows = batch("backup", "list", "--json").json
    assert [(row["name"], row["where"], row["check"]) for row in rows] == [
        (NEW, "folder", "checksums only"),
        (NEW, "elsewhere", "checksums only"),
        (OLD, "folder", "not verified"),
    ]
    (folder / NEW).unlink()
    assert f"{bucket.url}/{NEW}" in batch("backup", "verify", NEW).out
    assert batch("backup", "download").code == 0
    assert (folder / NEW).read_bytes() == data
    refuses(batch("backup", "download", NEW), f"backups/{NEW} exists already")
    refuses(batch("backup", "download", OLD), f"{bucket.url}/{OLD}: there is no such backup")


def test_a_download_with_another_name_than_backups_have_is_not_counted_as_a_backup(
    batch: Batch, folder: Path, ledger: Path, bucket: Bucket
) -> None:
    bucket.put("elsewhere/renamed.gz", (folder / NEW).read_bytes())
    with clock.moved(datetime(2026, 3, 29, 13, tzinfo=UTC)):
        assert batch("backup", "download", f"s3://{bucket.name}/elsewhere/renamed.gz").code == 0
        assert asyncio.run(waiting(access(get_settings()))) == []
    assert (folder / "renamed.gz").exists() and asyncio.run(access(get_settings()).records()) == {}


def test_a_file_that_is_already_there_is_not_sent_again_and_never_overwritten(
    batch: Batch, folder: Path, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put(f"shop/db/{NEW}", other := make_archive(tmp_path / "other", tables=1).read_bytes())
    refuses(
        batch("backup", "upload", NEW),
        f"{bucket.url}/{NEW} exists and is another backup",
        "a place of its own",
    )
    assert (
        bucket.client.get_object(Bucket=bucket.name, Key=f"shop/db/{NEW}")["Body"].read() == other
    )
    for place in (bucket.url, f"file://{tmp_path}/mount"):
        first, again = (batch("backup", "upload", OLD, BACKUP_URL=place) for _ in range(2))
        assert (first.code, first.out) == (0, again.out)


def test_a_file_that_only_has_the_name_of_a_backup_in_the_folder_is_not_taken_for_it(
    batch: Batch, folder: Path, bucket: Bucket
) -> None:
    make_archive(folder.parent / NEW)
    refuses(batch("backup", "upload", f"./{NEW}"), f"{NEW} is not in BACKUP_DIR")
    assert bucket.keys() == []


def test_a_damaged_backup_is_not_uploaded(batch: Batch, folder: Path, bucket: Bucket) -> None:
    damage(folder / NEW)
    refuses(batch("backup", "upload", NEW), NEW, "is damaged", code=3)
    assert bucket.keys() == []


def test_a_backup_that_arrives_damaged_gets_no_name(
    batch: Batch, folder: Path, bucket: Bucket
) -> None:
    damage(folder / NEW)
    bucket.put(f"shop/db/{NEW}", (folder / NEW).read_bytes())
    (folder / NEW).unlink()
    refuses(batch("backup", "download", NEW), "is damaged", code=3)
    assert [path.name for path in folder.iterdir()] == [OLD]


@pytest.mark.parametrize(
    "address", [f"s3://AKIATESTS:{SECRET}@bucket/shop/{NEW}", f"s3://bucket/{NEW}?sign={SECRET}"]
)
def test_keys_in_an_address_are_refused_and_not_shown(batch: Batch, address: str) -> None:
    for command in ("show", "verify", "download", "diff", "restore"):
        done = batch("backup", command, address)
        refuses(
            done,
            "only a bucket, a prefix and a name may stand in s3://bucket/prefix/name",
            "AWS_ACCESS_KEY_ID",
        )
        assert SECRET not in done.err and "AKIA" not in done.err


@pytest.mark.parametrize(
    "words", [("upload", NEW), ("download", NEW), ("show", "s3://other/x/y"), ("prune",)]
)
def test_a_store_that_refuses_the_keys_is_one_line_without_them(
    batch: Batch, folder: Path, bucket: Bucket, words: tuple[str, ...]
) -> None:
    with refusing(403, "InvalidAccessKeyId") as port:
        done = batch("backup", *words, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    refuses(done, "refuses the keys", "AWS_ACCESS_KEY_ID", code=3)
    assert SECRET not in done.err and "AKIA" not in done.err and "127.0.0.1" not in done.err
    assert len(list(folder.iterdir())) == 2


def test_a_prune_says_of_each_why_it_stays_or_goes_in_both_places(
    batch: Batch, folder: Path, ledger: Path, bucket: Bucket, keeping_one: None
) -> None:
    (folder / "notes.txt").touch()
    for name in (OLD, NEW):
        bucket.put(f"shop/db/{name}", (folder / name).read_bytes())
    with clock.moved(NOW + timedelta(days=7)):
        dry = batch("backup", "prune", "--dry-run", "--json").json
        assert len(list(folder.iterdir())) == 3 and len(bucket.keys()) == 2
        told = batch("backup", "prune", "--json").json
    assert [(row["backup"], row["where"], row["then"], row["why"]) for row in told] == [
        (NEW, "folder", "stays", "the newest"),
        (OLD, "folder", "deleted", "older than 1 day"),
        (NEW, "elsewhere", "stays", "the newest"),
        (OLD, "elsewhere", "deleted", "older than 1 day"),
    ]
    assert dry == [{**row, "then": row["then"].replace("deleted", "would go")} for row in told]
    assert {path.name for path in folder.iterdir()} == {NEW, "notes.txt"} and bucket.keys() == [
        f"shop/db/{NEW}"
    ]


def test_a_prune_deletes_nothing_when_the_newest_cannot_be_read(
    batch: Batch, folder: Path, ledger: Path
) -> None:
    """It was verified when it was whole."""
    for name in (OLD, NEW):
        assert batch("backup", "verify", name).code == 0
    with (folder / NEW).open("r+b") as file:
        file.truncate(100)
    with clock.moved(NOW + timedelta(days=900)):
        done = batch("backup", "prune", "--json")
    assert f"No old backup is deleted in backups: {NEW} has failed its check" in done.err
    assert {row["then"] for row in done.json} == {"stays"} and (folder / OLD).exists()
    assert [row["check"] for row in batch("backup", "list", "--json").json] == [
        "failed",
        "checksums only",
    ]


def test_a_prune_deletes_nothing_while_the_ledger_with_its_pins_is_away(
    batch: Batch, folder: Path
) -> None:
    refuses(
        batch("backup", "prune", LEDGER_URL="postgresql://bob:hunter2@127.0.0.1:1/ledger"),
        "LEDGER_URL",
        code=3,
    )
    listed = batch("backup", "list")
    assert (
        listed.code == 0
        and NEW in listed.out
        and "what the ledger knows of backups is not shown" in listed.err
    )
    assert "hunter2" not in listed.err


@pytest.mark.first_start
@pytest.mark.parametrize("words", [("create",), ("verify", OLD), ("upload", OLD)])
def test_the_work_is_done_and_reported_even_while_the_ledger_is_away(
    batch: Batch, folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    make_sqlite(tmp_path / "app.db")
    away = {
        "LEDGER_URL": "postgresql://bob:hunter2@127.0.0.1:1/ledger",
        "BACKUP_URL": f"file://{tmp_path}/mount",
    }
    done = batch("backup", *words, **away)
    assert done.code == 0 and " row" in done.out
    assert "could not be recorded in the ledger" in done.err and "hunter2" not in done.err


def test_a_pin_holds_until_it_is_removed(
    batch: Batch, folder: Path, ledger: Path, keeping_one: None
) -> None:
    assert batch("backup", "pin", OLD).out == f"{OLD} is pinned\n"
    assert batch("backup", "pin", OLD).out == f"{OLD} was pinned already\n"
    with clock.moved(NOW + timedelta(days=900)):
        assert batch("backup", "prune").code == 0 and (folder / OLD).exists()
        assert batch("backup", "unpin", OLD).out == f"{OLD} is not pinned any more\n"
        assert batch("backup", "unpin", OLD, "--json").json == {"backup": OLD, "changed": False}
        assert batch("backup", "prune").code == 0 and not (folder / OLD).exists()
    make_archive(folder.parent / OLD)
    refuses(batch("backup", "pin", f"./{OLD}"), f"{OLD} is neither in BACKUP_DIR nor at BACKUP_URL")


def test_a_backup_is_deleted_in_each_place_and_no_record_of_it_stays(
    batch: Batch, folder: Path, ledger: Path, bucket: Bucket
) -> None:
    assert batch("backup", "upload", OLD).code == 0
    assert batch("backup", "list", "--rescan").code == 0
    refuses(batch("backup", "delete", OLD), "nothing was deleted", "--yes is needed")
    assert (folder / OLD).exists()
    done = batch("backup", "delete", OLD, "--yes", "--json")
    assert (done.code, done.json) == (0, {"backup": OLD, "places": ["folder", "elsewhere"]}), (
        done.err
    )
    assert {row["name"] for row in batch("backup", "list", "--json").json} == {NEW}
    with closing(sqlite3.connect(ledger)) as connection:
        assert {name for (name,) in connection.execute("SELECT name FROM batch_backups")} == {NEW}
    assert batch("changes", "--action", "backup.delete", "--json").json[0]["target"] == OLD
    refuses(batch("backup", "delete", OLD, "--yes"), f"there is no backup {OLD}")


def test_a_pinned_backup_is_not_deleted(batch: Batch, folder: Path, ledger: Path) -> None:
    assert batch("backup", "pin", OLD).code == 0
    refuses(
        batch("backup", "delete", OLD, "--yes"), f"{OLD} is pinned", f"batch backup unpin {OLD}"
    )
    assert (folder / OLD).exists()
    assert batch("backup", "unpin", OLD).code == 0
    assert batch("backup", "delete", OLD, "--yes").out == f"{OLD} is deleted (folder)\n"
    assert not (folder / OLD).exists()


@pytest.mark.parametrize("name", ["latest", "../app.db", f"backups/{OLD}", "app.db"])
def test_only_a_backup_is_deleted_by_its_name(batch: Batch, folder: Path, name: str) -> None:
    refuses(batch("backup", "delete", name, "--yes"), "no name of a backup")
    assert len(list(folder.iterdir())) == 2


def test_a_pin_can_be_removed_from_a_backup_that_is_damaged_or_gone(
    batch: Batch, folder: Path, ledger: Path
) -> None:
    for name in (OLD, NEW):
        assert batch("backup", "pin", name).code == 0
    (folder / NEW).write_bytes(b"cut")
    (folder / OLD).unlink()
    for name in (OLD, NEW):
        assert batch("backup", "unpin", name).out == f"{name} is not pinned any more\n"


async def test_a_backup_that_is_pinned_between_the_preview_and_the_prune_stays(
    batch: Batch, folder: Path, ledger: Path, keeping_one: None
) -> None:
    settings = get_settings()
    with clock.moved(NOW + timedelta(days=900)):
        planned = await prune_plans(access(settings))
        assert [plan.decision.going for plan in planned] == [[OLD]]
        await pin(access(settings), OLD, "somebody else")
        assert [one async for one in delete_old(access(settings), planned)] == []
    assert (folder / OLD).exists()


def test_a_check_of_the_copy_says_nothing_of_the_file_in_the_folder(
    batch: Batch, folder: Path, ledger: Path, bucket: Bucket
) -> None:
    """And the other way round."""
    assert batch("backup", "upload", NEW).code == 0
    damage(folder / NEW)
    assert batch("backup", "verify", NEW).code == 3
    assert batch("backup", "verify", f"{bucket.url}/{NEW}").code == 0
    rows = batch("backup", "list", "--json").json
    assert [(row["where"], row["check"]) for row in rows if row["name"] == NEW] == [
        ("folder", "failed"),
        ("elsewhere", "checksums only"),
    ]
    assert (
        batch("backup", "show", f"{bucket.url}/{NEW}", "--json").json["check"] == "checksums only"
    )


def changed(path: Path, tmp_path: Path) -> None:
    """Another backup in its place, whose checksums all fit, made by somebody who can write
    there.
    """
    path.unlink()
    make_archive(tmp_path / "other.gz", tables=3).rename(path)


@pytest.mark.parametrize("where", ["folder", "elsewhere"])
def test_a_backup_that_was_changed_since_we_made_it_is_reported_though_its_checksums_fit(
    batch: Batch, tmp_path: Path, ledger: Path, where: str
) -> None:
    """Somebody who can write the place can write the checksums too, but not the ledger."""
    far = tmp_path / "mount"
    name = batch("backup", "create", "--json", BACKUP_URL=f"file://{far}").json["name"]
    assert batch("backup", "upload", name).code == 0
    path = (tmp_path / "backups" if where == "folder" else far) / name
    changed(path, tmp_path)
    words = (str(path), "was changed since it was made", "look at who can write there")
    refuses(batch("backup", "verify", str(path)), *words, code=3)
    refuses(batch("backup", "verify", "--restore", str(path)), *words, code=3)
    refuses(batch("backup", "restore", str(path), "--dry-run"), *words, "--changed", code=3)
    if where == "elsewhere":
        (tmp_path / "backups" / name).unlink()
        refuses(batch("backup", "download", name), *words, code=3)
    told = batch("backup", "restore", str(path), "--dry-run", "--changed")
    assert "was changed" not in told.err and "is of PostgreSQL" in told.err, (
        "the next thing that is in the way"
    )


def test_a_rescan_finds_a_backup_that_was_changed_since_we_made_it(
    batch: Batch, tmp_path: Path, ledger: Path
) -> None:
    name = batch("backup", "create", "--json").json["name"]
    changed(tmp_path / "backups" / name, tmp_path)
    (row,) = batch("backup", "list", "--rescan", "--json").json
    assert row["check"] == "failed" and row["failed_check"].startswith(
        "it was changed since it was made: "
    )
    make_archive(tmp_path / "backups" / OLD)
    assert [row["check"] for row in batch("backup", "list", "--rescan", "--json").json] == [
        "failed",
        "not verified",
    ]


def test_a_list_waits_for_nobody_and_migrates_nothing(
    batch: Batch, folder: Path, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_GIVE_UP_SECONDS", 0.2)
    batch("backup", "verify", OLD)
    with closing(sqlite3.connect(ledger, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for words in (("list",), ("list", "--json"), ("show", OLD)):
            done = batch("backup", *words)
            assert (done.code, done.err) == (0, "") and "checksums only" in done.out
        other.execute("DROP TABLE batch_backups")
        other.execute("UPDATE batch_alembic_version SET version_num = 'ledger_0005'")
        other.execute("COMMIT")
        for words in (("list",), ("show", OLD)):
            done = batch("backup", *words)
            assert (
                done.code == 0
                and "is not shown: the ledger is at an older migration than this code" in done.err
            )
        assert other.execute("SELECT version_num FROM batch_alembic_version").fetchone() == (
            "ledger_0005",
        )


async def test_only_verified_and_young_ones_wait_for_their_copy(
    batch: Batch, folder: Path, ledger: Path, bucket: Bucket
) -> None:
    forget_settings()
    settings = get_settings()
    await check(access(settings), OLD)
    damage(folder / NEW)
    with pytest.raises(BackupError):
        await check(access(settings), NEW)
    with clock.moved(NOW):
        assert await waiting(access(settings)) == [OLD]
        await upload(access(settings), OLD)
        assert await waiting(access(settings)) == []
    bucket.client.delete_object(Bucket=bucket.name, Key=f"shop/db/{OLD}")
    with clock.moved(NOW + timedelta(days=7)):
        assert await waiting(access(settings)) == []


def test_upload_without_a_place_names_the_setting(batch: Batch, folder: Path) -> None:
    refuses(batch("backup", "upload"), "BACKUP_URL is empty", "s3://bucket/prefix")
    refuses(batch("backup", "download", NEW), "BACKUP_URL is empty", "whole URL")


def test_an_empty_place_is_reported(batch: Batch) -> None:
    assert batch("backup", "list").out == "there is no backup in backups\n"
    assert batch("backup", "list", "--json").json == []
    refuses(batch("backup", "verify"), "there is no backup in backups (BACKUP_DIR)")


def test_piped_progress_is_plain_lines_and_the_result_stands_alone_on_stdout(
    folder: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batch_system", "backup", "verify", NEW, "--json"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["rows"] == 6 and "\x1b" not in done.stderr


def subcommands() -> list[str]:
    group: Any = typer.main.get_group(backups)
    return group.list_commands(None)


@pytest.mark.parametrize("name", subcommands())
def test_the_help_of_each_command_has_an_example(name: str) -> None:
    assert f"batch backup {name}" in "\n".join(EXAMPLES[f"backup {name}"])
