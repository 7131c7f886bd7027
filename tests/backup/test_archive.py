from __future__ import annotations

import gzip
import json
import subprocess
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from batch_system.backup.comparing.tally import whole_rows
from batch_system.backup.file.format import LARGEST_JSON, PIECE_BYTES, TRAILER_BYTES
from batch_system.backup.file.reader import Backup, LocalFile, read_header
from batch_system.backup.file.writer import Archive
from batch_system.backup.making.create import create_backup
from batch_system.database.engine import Database
from batch_system.errors import BackupError
from tests.backup.contents import HEADER, gzip_members, make_archive, members

TABLE: dict[str, Any] = {
    "schema": "public", "name": "t", "folder": "data/0001-public.t",
    "columns": ["a"], "types": ["text"], "key": [], "rows": 0, "bytes": 0,
}  # fmt: skip


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    return make_archive(tmp_path / "small.backup.gz")


def test_tar_and_gzip_open_a_backup(backup: Path) -> None:
    listed = subprocess.run(["tar", "tzf", str(backup)], capture_output=True, text=True, check=True)
    parts = [
        f"data/000{table}-public.t{table}/000{part}.copy" for table in (1, 2) for part in (1, 2, 3)
    ]
    assert (
        listed.stdout.split() == ["header.json", *parts, "manifest.json"] == list(members(backup))
    )
    assert not listed.stderr
    subprocess.run(["gzip", "-t", str(backup)], check=True)


def test_the_manifest_has_the_place_of_every_member_and_the_trailer_that_of_the_manifest(
    backup: Path,
) -> None:
    whole, manifest = backup.read_bytes(), json.loads(members(backup)["manifest.json"])
    for member in manifest["members"]:
        raw = gzip.decompress(whole[member["offset"] : member["offset"] + member["packed"]])
        assert tarfile.TarInfo.frombuf(raw[:512], "utf-8", "strict").name == member["name"]
        assert raw[512 : 512 + member["bytes"]] == members(backup)[member["name"]]
    assert [len(packed) for packed in gzip_members(backup)][:-2] == [
        one["packed"] for one in manifest["members"]
    ]
    assert (
        len(gzip_members(backup)[-1]) == TRAILER_BYTES
        and gzip.decompress(gzip_members(backup)[-1]) == b""
    )


class Counted(LocalFile):
    """A source that counts the bytes that are read."""

    reads = 0

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return super().read(offset, length)


def test_opening_reads_the_trailer_and_the_manifest_and_nothing_else(backup: Path) -> None:
    with Counted(backup) as file:
        opened = Backup.open(file)
        assert file.reads == 2
        assert [str(table) for table in opened.tables] == ["public.t1", "public.t2"]
        assert list(opened.parts(opened.tables[1])) == [b"2\t0\n", b"2\t1\n", b"2\t2\n"]
        assert opened.header.rows == 6 and opened.header.taken_at == datetime(
            2026, 3, 29, 12, tzinfo=UTC
        )
        assert file.reads == 5


def test_the_header_is_read_from_the_first_member_alone(backup: Path) -> None:
    header = read_header(backup)
    backup.write_bytes(gzip_members(backup)[0])
    assert read_header(backup) == header
    assert (header.kind, header.database, header.format) == ("postgresql", "app", 1)


def test_a_row_larger_than_a_member_goes_over_several_and_is_read_in_pieces_in_their_order(
    tmp_path: Path,
) -> None:
    path = tmp_path / "large.backup.gz"
    path.touch()
    row = b"x" * (5 * PIECE_BYTES) + b"\n"
    table = {
        "schema": "public",
        "name": "t",
        "folder": "data/0001-public.t",
        "columns": ["a"],
        "types": ["text"],
    }
    with Archive(path, datetime.now(UTC)) as archive:
        archive.add_header("postgresql", **HEADER)
        rows = [
            future.result()
            for future in archive.add_rows("data/0001-public.t/0001.copy", [row, b"y\n"])
        ]
        archive.finish(
            tables=[{**table, "key": [], "rows": 2, "bytes": len(row) + 2}],
            sequences=[],
            left_out=[],
        )
    assert rows == [0, 0, 0, 0, 0, 2]
    with LocalFile(path) as file:
        backup = Backup.open(file)
        pieces = list(backup.parts(backup.tables[0]))
        assert len(pieces) == 6 and b"".join(pieces) == row + b"y\n"
        assert list(whole_rows(pieces)) == [[row.removesuffix(b"\n"), b"y"]]
    assert members(path)["data/0001-public.t/0001.copy"] == row + b"y\n"


def test_pieces_are_in_the_order_in_which_they_were_added_however_long_each_takes(
    tmp_path: Path,
) -> None:
    path = tmp_path / "order.backup.gz"
    path.touch()
    sizes = [700_000, 1, 1, 1, 400_000, 1, 1]
    with Archive(path, datetime.now(UTC)) as archive:
        archive.add_header("postgresql", **HEADER)
        futures = [
            future
            for number, size in enumerate(sizes, 1)
            for future in archive.add_rows(
                f"data/0001-public.t/{number:04}.copy", [b"%d" % number * size + b"\n"]
            )
        ]
        table = {
            "schema": "public",
            "name": "t",
            "folder": "data/0001-public.t",
            "columns": ["a"],
            "types": ["text"],
        }
        size = sum(sizes) + len(sizes)
        archive.finish(
            tables=[{**table, "key": [], "rows": 7, "bytes": size}], sequences=[], left_out=[]
        )
    assert sum(future.result() for future in futures) == 7
    parts = [data for name, data in members(path).items() if name.startswith("data/")]
    assert [data[:1] for data in parts] == [b"%d" % number for number in range(1, 8)]


def begun(path: Path, size: int, **contents: Any) -> None:
    """Begin a backup of this size and content."""
    path.touch()
    with Archive(path, datetime.now(UTC)) as archive:
        archive.add_header("postgresql", **HEADER)
        archive.refuse_too_large(
            size, **{"tables": [TABLE], "sequences": [], "left_out": [], **contents}
        )


def test_a_manifest_that_could_not_be_read_back_is_refused_before_a_row_is_added(
    tmp_path: Path,
) -> None:
    """The manifest lists all gzip members, so it is too large for a database of 700 GB."""
    begun(path := tmp_path / "begun", 500 * 1024**3)
    for size, contents, message in (
        (700 * 1024**3, {}, "larger than these backups can be: use pgBackRest, or exclude tables"),
        (
            0,
            {"tables": [{**TABLE, "columns": ["x" * 20_000]}]},
            r"can't hold .*: tables\[0\].columns\[0\]: .*10000",
        ),
        (0, {"left_out": ["a\0b"]}, r"can't hold .*: left_out\[0\]: a name must not contain a NUL"),
    ):
        with pytest.raises(BackupError, match=message):
            begun(path, size, **contents)


async def test_a_database_whose_manifest_would_be_too_large_is_not_copied(
    database_url: str,
    application: Database,
    use_database: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """The limits are so small in this test that one page of a database is too large."""
    use_database(database_url)
    monkeypatch.setattr("batch_system.backup.file.writer.PIECE_BYTES", 1)
    monkeypatch.setattr("batch_system.backup.file.writer.MEMBER_JSON", LARGEST_JSON)
    monkeypatch.setattr("batch_system.backup.file.writer.Archive.add_rows", None)
    monkeypatch.setattr("batch_system.backup.making.from_sqlite._copy_pages", None)
    with pytest.raises(BackupError, match="larger than these backups can be"):
        await create_backup(tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []
