"""Finding a backup by its name, and a folder as a place of backups."""

from __future__ import annotations

import errno
import os
import resource
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

import pytest

from batch_system import clock
from batch_system.backup.file.folder import NAME as OURS
from batch_system.backup.file.reader import Backup, LocalFile
from batch_system.backup.places.place import Folder, Places, backups, find, nothing
from batch_system.concurrency.stoppable import Stop, Stopped
from batch_system.config import forget_settings, get_settings
from batch_system.errors import BackupError, InvalidSetting
from tests.backup.contents import make_archive
from tests.backup.s3 import Bucket, bucket, refusing, s3_server

__all__ = ["bucket", "s3_server"]

OLD, NEW, FAR = (f"backup_202511{day}_020000.backup.gz" for day in (24, 25, 26))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "backups"
    folder.mkdir()
    make_archive(folder / OLD)
    make_archive(folder / NEW)
    for name in (
        "backup_of_the_cat.backup.gz",
        f"{NEW}.old",
        f".{NEW[:-10]}.partial",
        "backup_20269999_020000.backup.gz",
    ):
        (folder / name).write_bytes(b"of somebody else")
    return folder


def found(text: str) -> str:
    forget_settings()
    with find(text) as source:
        return source.name


def refused(text: str) -> str:
    forget_settings()
    with pytest.raises(BackupError) as caught:
        find(text)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("latest", f"backups/{NEW}"),
        (OLD, f"backups/{OLD}"),
        (f"backups/{OLD}", f"backups/{OLD}"),
        (f"./backups/{NEW}", f"backups/{NEW}"),
        ("elsewhere.gz", "elsewhere.gz"),
    ],
)
def test_a_backup_is_found_by_its_path_its_name_or_as_the_latest(
    folder: Path, text: str, means: str
) -> None:
    make_archive(Path("elsewhere.gz"))
    assert found(text) == means


def test_a_missing_backup_is_reported_with_the_newest_one(folder: Path) -> None:
    told = refused("backup_20200101_000000.backup.gz")
    assert told.startswith(
        "there is no backup backup_20200101_000000.backup.gz in backups (BACKUP_DIR); the newest "
        "there"
    )
    assert NEW in told and told.endswith("Allowed: a path, a name, latest, s3://bucket/prefix/name")
    assert (
        refused(f"backups/{FAR}")
        == f"the backup backups/{FAR} can't be read: No such file or directory"
    )
    assert refused("gs://key:secret@bucket/x") == (
        "a backup can't be at gs://…; allowed: s3://bucket/prefix, file:///folder"
    )


def test_latest_is_an_error_if_there_is_no_backup(tmp_path: Path) -> None:
    assert refused("latest") == "there is no backup in backups (BACKUP_DIR)"


def test_the_bucket_is_searched_if_the_folder_has_no_such_backup(
    bucket: Bucket, folder: Path
) -> None:
    bucket.put(f"shop/db/{FAR}", (folder / NEW).read_bytes())
    bucket.put(f"shop/db/{OLD}", b"")
    bucket.put("shop/db/notes.txt", b"")
    assert found(OLD) == f"backups/{OLD}"
    assert (
        found(FAR)
        == found(f"{bucket.url}/latest")
        == found(f"{bucket.url}/{FAR}")
        == f"{bucket.url}/{FAR}"
    )
    with find(FAR) as source:
        assert sum(table.rows for table in Backup.open(source).tables) == 6


def test_the_latest_is_the_newest_of_both_places(bucket: Bucket, folder: Path) -> None:
    bucket.put(f"shop/db/{FAR}", (folder / NEW).read_bytes())
    assert found("latest") == f"{bucket.url}/{FAR}"
    make_archive(folder / FAR)
    assert found("latest") == f"backups/{FAR}", "where both have it, the one that is near"


def test_a_backup_with_a_name_in_the_future_is_not_the_latest_and_is_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_two_days, in_half_an_hour = (
        "backup_20251127_020000.backup.gz",
        "backup_20251125_123000.backup.gz",
    )
    with clock.moved(datetime(2025, 11, 25, 12, tzinfo=UTC)):
        make_archive(folder / "backup_20300101_000000.backup.gz")
        make_archive(folder / in_two_days)
        assert (
            found("latest")
            == found(f"file://{folder}/latest").removeprefix(f"{folder.parent}/")
            == f"backups/{NEW}"
        )
        told = (
            "backup_20251127_020000.backup.gz, backup_20300101_000000.backup.gz are in the future"
        )
        assert told in caplog.text
        make_archive(folder / in_half_an_hour)
        assert found("latest") == f"backups/{in_half_an_hour}", "clocks differ by so much"


def test_latest_is_an_error_if_one_place_cannot_be_listed(bucket: Bucket, folder: Path) -> None:
    with refusing(403, "AccessDenied") as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        told = refused("latest")
        assert "may not do that" in told and told.endswith(
            "So which backup is the latest is not known: give its name"
        )
        assert found(NEW) == f"backups/{NEW}"


@pytest.mark.parametrize("name", ["m%20t", "m%C3%A4%3F%23", "100%"])
def test_a_file_url_is_decoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (mount := tmp_path / unquote(name)).mkdir()
    make_archive(mount / FAR)
    monkeypatch.setenv("BACKUP_URL", f"file://{tmp_path}/{name}")
    assert found(FAR) == found(f"file://{tmp_path}/{name}/{FAR}") == f"{mount}/{FAR}"


@pytest.mark.parametrize(
    "url", ["file://backups", "file://host/mnt", "file:///a?b", "file:///a#b", "file:///a%00b"]
)
def test_a_file_url_without_an_absolute_path_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("BACKUP_URL", url)
    forget_settings()
    with pytest.raises(
        InvalidSetting, match=r"^setting BACKUP_URL: not the URL of a folder.*allowed: file:///"
    ):
        get_settings()
    monkeypatch.delenv("BACKUP_URL")
    assert "not the URL of a folder" in refused(f"{url}/{FAR}")


def test_the_other_place_is_not_the_folder_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backups").mkdir()
    (tmp_path / "link").symlink_to("backups")
    for same in ("backups", "link", "backups/../backups/", "b%61ckups"):
        monkeypatch.setenv("BACKUP_URL", f"file://{tmp_path}/{same}")
        forget_settings()
        with pytest.raises(
            InvalidSetting, match=r"setting BACKUP_URL: it is the folder of BACKUP_DIR \(backups\)"
        ):
            get_settings()
    monkeypatch.setenv("BACKUP_URL", f"file://{tmp_path}/other")
    forget_settings()
    settings = get_settings()
    (tmp_path / "other").symlink_to("backups")
    with pytest.raises(InvalidSetting, match="it is the folder of BACKUP_DIR"):
        Places.of(settings).all()


def test_a_file_url_is_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mount").mkdir()
    make_archive(tmp_path / "mount" / FAR)
    monkeypatch.setenv("BACKUP_URL", f"file://{tmp_path}/mount")
    assert found(FAR) == found(f"file://{tmp_path}/mount/{FAR}") == f"{tmp_path}/mount/{FAR}"


def test_without_the_library_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKUP_URL", "s3://bucket/prefix")
    for name in [name for name in sys.modules if name.startswith("obstore")] + [
        "batch_system.backup.places.s3"
    ]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert refused(FAR).endswith("pip install 'batch-system[s3]'")
    assert found(NEW) == f"backups/{NEW}"


def test_the_env_file_may_hold_the_keys(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put(f"shop/db/{FAR}", b"x")
    for name in bucket.settings:
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_text(
        "".join(f"{name}={value}\n" for name, value in bucket.settings.items())
    )
    assert found(FAR) == f"{bucket.url}/{FAR}"


def test_only_files_with_exact_backup_names_are_backups(folder: Path) -> None:
    listed = Folder(folder).listed()
    assert len(listed) == 6 and list(backups(listed)) == [OLD, NEW]
    assert Folder(folder / "missing").listed() == {}


def test_a_file_that_another_process_renames_meanwhile_is_not_missed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    @contextmanager
    def and_one_goes(path: Path) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        (folder / f".{NEW[:-10]}.partial").unlink()
        yield found

    monkeypatch.setattr(os, "scandir", and_one_goes)
    assert list(backups(Folder(folder).listed())) == [OLD, NEW]


def test_a_copy_has_its_name_only_when_it_is_whole(folder: Path, tmp_path: Path) -> None:
    target, seen = Folder(tmp_path / "copies"), []
    with LocalFile(folder / NEW) as source:
        target.put(source, FAR, Stop(), lambda done: seen.append(sorted(target.listed())))
        with pytest.raises(BackupError, match=f"{FAR} exists already"):
            target.put(source, FAR, Stop(), nothing)
    assert seen and all(OURS.fullmatch(name) is None for names in seen for name in names)
    copy = tmp_path / "copies" / FAR
    assert copy.read_bytes() == (folder / NEW).read_bytes() and copy.stat().st_mode & 0o777 == 0o600


def test_a_copy_never_overwrites_a_file_that_appeared_meanwhile(
    folder: Path, tmp_path: Path
) -> None:
    target = Folder(tmp_path / "copies")

    def somebody_else(_: int) -> None:
        (tmp_path / "copies" / FAR).write_bytes(b"another backup")

    with (
        LocalFile(folder / NEW) as source,
        pytest.raises(BackupError, match=f"{FAR} exists already"),
    ):
        target.put(source, FAR, Stop(), somebody_else)
    assert {path.name: path.read_bytes() for path in (tmp_path / "copies").iterdir()} == {
        FAR: b"another backup"
    }


@pytest.mark.parametrize("knows_links", [True, False])
def test_a_copy_with_its_final_name_survives_a_power_failure(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_links: bool
) -> None:
    """The folder is synchronized after the rename. A file system without hard links overwrites no
    file either.
    """
    events: list[str] = []
    target, fsync = Folder(tmp_path / "copies"), os.fsync

    def synced(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            events.append(f"folder synced with {FAR in target.listed()}")
        fsync(descriptor)

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fsync", synced)
    if not knows_links:
        monkeypatch.setattr(os, "link", refuse)
    with LocalFile(folder / NEW) as source:
        target.put(source, FAR, Stop(), nothing)
        assert events == ["folder synced with True"] and list(target.listed()) == [FAR]
        with pytest.raises(BackupError, match=f"{FAR} exists already"):
            target.put(source, FAR, Stop(), nothing)
        target.delete(FAR)
        with pytest.raises(BackupError, match=f"{FAR} exists already"):
            target.put(source, FAR, Stop(), lambda _: (target.path / FAR).touch())
    assert target.listed() == {FAR: 0}


def test_a_copy_that_is_stopped_or_not_sound_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    target = Folder(tmp_path / "copies")
    data = bytearray((folder / NEW).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / OLD).write_bytes(data)
    stop = Stop()
    for name, error, asked in ((OLD, BackupError, Stop()), (NEW, Stopped, stop)):
        with LocalFile(folder / name) as source, pytest.raises(error):
            target.put(source, FAR, asked, lambda _: stop.request())
    assert target.listed() == {}


def test_a_disk_that_becomes_full_during_a_copy_keeps_only_the_earlier_files(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with LocalFile(folder / NEW) as source:
        resource.setrlimit(resource.RLIMIT_FSIZE, (source.size - 1, limits[1]))
        try:
            with pytest.raises(
                BackupError, match=r"backups: File too large\. Free some space there"
            ):
                Folder(folder).put(source, FAR, Stop(), nothing)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        LocalFile(folder / NEW) as source,
        pytest.raises(BackupError, match=r"file.*A file stands where a folder"),
    ):
        Folder(tmp_path / "file").put(source, FAR, Stop(), nothing)
    os.mkdir(folder / FAR)
    with pytest.raises(
        BackupError, match=rf"the old backup .*{FAR} can't be deleted: .* Delete it by hand"
    ):
        Folder(folder).delete(FAR)


def test_an_invalid_place_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKUP_URL", "gs://bucket")
    forget_settings()
    with pytest.raises(
        InvalidSetting, match=r"setting BACKUP_URL: .*allowed: s3://bucket/prefix or file:///folder"
    ):
        found("latest")
