from __future__ import annotations

import gzip
import hashlib
import json
import os
import struct
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batch_system.backup.file.format import TRAILER_BYTES, Trailer
from batch_system.backup.file.reader import Backup, LocalFile, read_header
from batch_system.backup.file.verify import Verified, verify
from batch_system.concurrency.stoppable import Stop, Stopped
from batch_system.errors import BackupError
from tests.backup.contents import HEADER, forge, gzip_members, make_archive

EXAMPLES = int(os.environ.get("BACKUP_EXAMPLES", "100"))
HEADER_FILE = (
    "header.json",
    json.dumps(
        {"format": 1, "kind": "postgresql", "taken_at": "2026-03-29T12:00:00+00:00", **HEADER}
    ).encode(),
)
PART = "data/0001-public.t/0001.copy"
TABLE: dict[str, Any] = {
    "schema": "public", "name": "t", "folder": "data/0001-public.t",
    "columns": ["a"], "types": ["text"], "key": [], "rows": 1, "bytes": 2,
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "backup_20260329_120000.backup.gz"


@pytest.fixture
def backup(path: Path) -> Path:
    return make_archive(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup that examples of Hypothesis change, and a copy of its bytes beside it."""
    path = make_archive(tmp_path_factory.mktemp("backups") / "changed.backup.gz")
    path.with_suffix(".whole").write_bytes(path.read_bytes())
    return path


def check(backup: Path) -> Verified:
    with LocalFile(backup) as file:
        return verify(file, Stop())


def refused(backup: Path, match: str) -> None:
    """Verifying the backup fails with a one-line message that names the file."""
    with pytest.raises(BackupError, match=match) as caught:
        check(backup)
    assert str(backup) in caught.value.message and "\n" not in caught.value.message


def test_a_whole_backup_passes(backup: Path) -> None:
    checked = check(backup)
    assert (checked.rows, checked.members) == (6, 7)


def test_verifying_ends_when_a_stop_is_requested(backup: Path) -> None:
    stop = Stop()
    stop.request()
    with pytest.raises(Stopped), LocalFile(backup) as file:
        verify(file, stop)


class Crossed(LocalFile):
    """A source of which one read waits for another read."""

    first = second = -1

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._was_read = threading.Event()

    def read(self, offset: int, length: int) -> bytes:
        if offset == self.first:
            assert self._was_read.wait(20)
        if offset == self.second:
            self._was_read.set()
        return super().read(offset, length)


def test_the_first_wrong_member_is_named_even_if_a_later_one_was_noticed_earlier(
    backup: Path,
) -> None:
    members = gzip_members(backup)
    for number in (3, 5):
        members[number] = members[number][:-1] + b"\xff"
    backup.write_bytes(b"".join(members))
    with Crossed(backup) as file:
        file.first, file.second = (sum(map(len, members[:number])) for number in (3, 5))
        with pytest.raises(BackupError, match=r"t1/0003.copy is not what was written"):
            verify(file, Stop())


def dropped(members: list[bytes]) -> list[bytes]:
    return members[:3] + members[4:]


def doubled(members: list[bytes]) -> list[bytes]:
    return members[:4] + members[3:]


def swapped(members: list[bytes]) -> list[bytes]:
    return [*members[:2], members[3], members[2], *members[4:]]


def swapped_in_size(members: list[bytes]) -> list[bytes]:
    """Two members of the same length, so that all offsets stay the same."""
    assert len(members[2]) == len(members[3])
    return swapped(members)


def cut_at_a_boundary(members: list[bytes]) -> list[bytes]:
    return members[:5]


def without_manifest(members: list[bytes]) -> list[bytes]:
    return [*members[:-2], members[-1]]


def without_trailer(members: list[bytes]) -> list[bytes]:
    return members[:-1]


def two_trailers(members: list[bytes]) -> list[bytes]:
    return [*members, members[-1]]


def another_after_it(members: list[bytes]) -> list[bytes]:
    return members * 2


def something_after_it(members: list[bytes]) -> list[bytes]:
    return [*members, gzip.compress(b"more")]


def nothing_before_it(members: list[bytes]) -> list[bytes]:
    return [gzip.compress(b""), *members]


@pytest.mark.parametrize(
    "change",
    [
        dropped,
        doubled,
        swapped,
        swapped_in_size,
        cut_at_a_boundary,
        without_manifest,
        without_trailer,
        two_trailers,
        another_after_it,
        something_after_it,
        nothing_before_it,
    ],
)
def test_moved_members_are_noticed_though_gzip_notices_nothing(
    backup: Path, change: Callable[[list[bytes]], list[bytes]]
) -> None:
    backup.write_bytes(b"".join(change(gzip_members(backup))))
    gzip.decompress(backup.read_bytes())
    refused(backup, "is damaged|is not a backup of this service")


def test_a_truncated_backup_is_distinguished_from_a_file_that_never_was_a_backup(
    backup: Path,
) -> None:
    backup.write_bytes(backup.read_bytes()[:-1])
    refused(backup, r"is damaged: it does not end with a trailer")
    latin = tarfile.TarInfo("Größe").tobuf(tarfile.GNU_FORMAT, "latin-1") + bytes(1024)
    for foreign in (
        *(gzip.compress(content) for content in (b"CREATE TABLE", latin, tar_file("x", b"y"), b"")),
        *(b"", b"PK\x03\x04", b"\x1f\x8b", bytes(100_000)),
    ):
        backup.write_bytes(foreign)
        refused(backup, r"is not a backup of this service$")
        with pytest.raises(BackupError, match="is not a backup of this service"):
            read_header(backup)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackupError, match=r"nowhere.backup.gz can't be read: No such file"):
        read_header(tmp_path / "nowhere.backup.gz")


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with one flipped bit, with a part removed, inserted, doubled, moved or overwritten,
    or truncated.
    """
    start = draw(st.integers(0, len(data) - 1))
    end = draw(st.integers(start, min(len(data), start + 2000)))
    there = draw(st.integers(0, len(data)))
    flipped = bytearray(data)
    flipped[start] ^= 1 << draw(st.integers(0, 7))
    piece = data[start:end]
    rest = data[:start] + data[end:]
    return draw(
        st.sampled_from(
            [
                bytes(flipped),
                data[:start],
                data[start + 1 :],
                rest,
                rest[:there] + piece + rest[there:],
                data[:there] + piece + data[there:],
                data[:start] + bytes(end - start) + data[end:],
                data[:start] + draw(st.binary(min_size=1, max_size=100)) + data[start:],
            ]
        )
    )


@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_every_change_of_the_bytes_is_noticed(whole: Path, data: st.DataObject) -> None:
    original = whole.with_suffix(".whole").read_bytes()
    damaged = data.draw(changed(original))
    assume(damaged != original)
    whole.write_bytes(damaged)
    refused(whole, "is damaged|is not a backup of this service|made by a newer version")


def test_a_change_of_any_bit_in_gzips_own_fields_is_noticed(backup: Path) -> None:
    """The bits that gunzip ignores: time, flags and system in each header, and the whole
    trailer.
    """
    original = backup.read_bytes()
    starts = [sum(map(len, gzip_members(backup)[:number])) for number in (0, 1, 7)]
    places = [start + place for start in starts for place in range(10)]
    for place in [*places, *range(len(original) - TRAILER_BYTES, len(original))]:
        flipped = bytearray(original)
        flipped[place] ^= 0x20
        backup.write_bytes(flipped)
        refused(backup, "is damaged|is not a backup of this service")


def test_a_newer_format_is_named_even_if_its_end_differs(path: Path) -> None:
    newer = {**json.loads(HEADER_FILE[1]), "format": 2}
    forge(path, [("header.json", json.dumps(newer).encode())])
    for content in (path.read_bytes(), path.read_bytes()[:-20]):
        path.write_bytes(content)
        refused(
            path,
            r"made by a newer version of this service: it has format 2, .* knows formats up to 1",
        )
        with pytest.raises(BackupError, match="has format 2"):
            read_header(path)


@pytest.mark.parametrize(
    "name",
    ["../escaped.copy", "/etc/passwd", "data/0001-t/../../0001.copy", "data/0001-t/1.copy\n", "x"],
)
def test_a_member_with_a_name_that_no_backup_has_is_refused(path: Path, name: str) -> None:
    forge(path, [HEADER_FILE, (name, b"1\n")])
    refused(path, "is not one that this service writes .*is not allowed there")


def test_two_members_with_one_name_are_refused(path: Path) -> None:
    other = "data/0001-public.t/0002.copy"
    forge(path, [HEADER_FILE, (PART, b"1\n"), (other, b"2\n"), (PART, b"3\n")], tables=[TABLE])
    refused(path, "is not allowed there")
    forge(
        path,
        [HEADER_FILE, (PART, b"1\n"), (PART, b"2\n")],
        tables=[{**TABLE, "rows": 2, "bytes": 4}],
    )
    refused(path, "0001.copy holds more or less than its manifest says")


def test_bytes_between_two_members_are_refused(path: Path) -> None:
    forge(path, [HEADER_FILE, (PART, b"1\n")], tables=[TABLE])
    header, part = listed(path)
    between = gzip.compress(b"")
    moved = [header, {**part, "offset": part["offset"] + len(between)}]
    with_second(path, between + gzip_members(path)[1], moved)
    refused(path, r"0001.copy at byte \d+, with 2 bytes in \d+")


def test_rows_of_no_table_are_refused(path: Path) -> None:
    refused(
        forge(path, [HEADER_FILE, (PART, b"1\n")]),
        "holds rows of no table of its manifest: data/0001-public.t",
    )


def test_contradicting_counts_are_refused(path: Path) -> None:
    forge(path, [HEADER_FILE, (PART, b"1\n")], tables=[{**TABLE, "rows": 2}])
    refused(path, "the members of t hold other rows than the table")
    forge(path, [HEADER_FILE, (PART, b"12")], tables=[TABLE])
    member = listed(path)[1]
    forge(
        path,
        [HEADER_FILE, (PART, b"12")],
        tables=[TABLE],
        members=[listed(path)[0], {**member, "rows": 1}],
    )
    refused(path, "does not have the number of rows that its manifest says")


def listed(path: Path) -> list[dict[str, Any]]:
    """The members in the manifest of a forged backup, which may be refused."""
    raw = gzip.decompress(gzip_members(path)[-2])[512:].rstrip(b"\0")
    members: list[dict[str, Any]] = json.loads(raw)["members"]
    return members


def test_a_header_that_the_manifest_does_not_repeat_is_refused(path: Path) -> None:
    other = {**json.loads(HEADER_FILE[1]), "database": "another"}
    refused(
        forge(path, [HEADER_FILE], header=other),
        "its header is not the one that its manifest repeats",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"tables": 7},
        {"tables": [{}]},
        {"members": None},
        {"members": [[]]},
        {"header": {}},
        {"header": []},
        {"tables": [{**TABLE, "rows": -1}]},
        {"tables": [{**TABLE, "rows": 1.5}]},
        {"tables": [{**TABLE, "folder": None, "types": []}]},
        {
            "sequences": [
                {"schema": "public", "name": "s", "last_value": "1; DROP", "is_called": True}
            ]
        },
        {
            "members": [
                {"name": 1, "offset": True, "packed": 2, "sha256": None, "bytes": 1e9, "rows": "2"}
            ]
        },
    ],
)
def test_a_manifest_of_another_kind_is_refused(path: Path, changes: dict[str, Any]) -> None:
    refused(
        forge(path, [HEADER_FILE], **changes), "its manifest is not one that this service writes"
    )


def test_deep_or_broken_json_is_refused(path: Path) -> None:
    for content in (b"[" * 100_000, b"{", b"7", b"\xff"):
        path.write_bytes(gzip.compress(tar_file("header.json", content)))
        refused(path, "is not (a )?JSON")


def tar_file(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("where", "size", "allowed"),
    [
        ("a member", 30_000_000, 10_000_000),
        ("the header", 30_000_000, 15_000_000),
        ("the manifest", 90_000_000, 80_000_000),
    ],
)
def test_a_decompression_bomb_takes_no_memory(
    path: Path, where: str, size: int, allowed: int
) -> None:
    """The manifest gives a small size, and no more than that is unpacked."""
    if where == "a member":
        forge(path, [HEADER_FILE, (PART, bytes(size))], tables=[TABLE])
        small = [listed(path)[0], {**listed(path)[1], "bytes": 2, "rows": 1}]
        bomb = gzip_members(path)[1]
        forge(path, [HEADER_FILE, (PART, b"1\n")], tables=[TABLE])
        with_second(path, bomb, small)
    elif where == "the manifest":
        forge(path, [HEADER_FILE], padding="x" * size)
    else:
        path.write_bytes(gzip.compress(tar_file("header.json", bytes(size)), 1))
    tracemalloc.start()
    try:
        refused(path, "is damaged|is not a backup")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < allowed


def with_second(path: Path, second: bytes, members: list[dict[str, Any]]) -> None:
    """Write a backup with these bytes after the header's member, and with a matching manifest and
    trailer.
    """
    first = gzip_members(path)[0]
    manifest = {
        "header": json.loads(HEADER_FILE[1]),
        "tables": [TABLE],
        "sequences": [],
        "left_out": [],
    }
    last = gzip.compress(
        tar_file("manifest.json", json.dumps({**manifest, "members": members}).encode())
        + bytes(1024)
    )
    trailer = Trailer(len(first) + len(second), len(last), hashlib.sha256(last).digest())
    path.write_bytes(first + second + last + trailer.pack())


def test_reading_checks_a_backup_as_verifying_does(backup: Path) -> None:
    members = gzip_members(backup)
    members[2] = members[2][:-1] + b"\xff"
    backup.write_bytes(b"".join(members))
    with LocalFile(backup) as file:
        opened = Backup.open(file)
        parts = opened.parts(opened.tables[0])
        assert next(parts) == b"1\t0\n"
        with pytest.raises(BackupError, match=r"0002.copy is not what was written"):
            next(parts)


def test_a_trailer_that_points_elsewhere_is_refused(backup: Path) -> None:
    whole = backup.read_bytes()
    for offset, packed in (
        (0, 2**63),
        (2**63, 0),
        (len(whole), len(whole)),
        (0, len(whole) - TRAILER_BYTES),
    ):
        at = len(whole) - TRAILER_BYTES + 16
        backup.write_bytes(whole[:at] + struct.pack("<QQ", offset, packed) + whole[at + 16 :])
        refused(backup, "is damaged")
