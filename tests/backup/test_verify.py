from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import pytest

from service.backup import create_backup
from service.backup.threads import Stop, Stopped
from service.backup.verify import verify
from service.errors import BackupError
from tests.backup.contents import make_sqlite


@pytest.fixture
async def backup(app_db: Path, tmp_path: Path) -> Path:
    make_sqlite(app_db, megabytes=7)
    return await create_backup(tmp_path / "backups")


def gzip_members(backup: Path) -> list[bytes]:
    found, rest = [], backup.read_bytes()
    while rest:
        one = zlib.decompressobj(wbits=31)
        one.decompress(rest)
        found.append(rest[: len(rest) - len(one.unused_data)])
        rest = one.unused_data
    return found


def refused(backup: Path) -> None:
    with pytest.raises(BackupError, match="can't be read back"):
        verify(backup, Stop())


def test_a_whole_backup_passes(backup: Path) -> None:
    verify(backup, Stop())


def test_a_flipped_bit_is_found(backup: Path) -> None:
    whole, start = backup.read_bytes(), 0
    for member in gzip_members(backup):
        for position in (0, -1, -8):  # the magic number, the length, and gzip's own checksum
            flip(backup, whole, start + position % len(member))
        if len(member) > 1_000_000:  # a bit in the tables at a member's start may mean nothing, and pass rightly
            flip(backup, whole, start + len(member) // 2)
        start += len(member)


def flip(backup: Path, whole: bytes, position: int) -> None:
    damaged = bytearray(whole)
    damaged[position] ^= 0x10
    backup.write_bytes(damaged)
    refused(backup)


@pytest.mark.parametrize("kept", [0, 10, 100, 3_000_000, -1, -9])
def test_a_cut_tail_is_found(backup: Path, kept: int) -> None:
    backup.write_bytes(backup.read_bytes()[:kept])
    refused(backup)


def test_a_dropped_doubled_or_moved_member_is_found_though_gzip_finds_nothing(backup: Path) -> None:
    members = gzip_members(backup)
    assert len(members) > 6
    for n in range(len(members)):
        for changed in (members[:n] + members[n + 1 :], members[: n + 1] + members[n:]):
            backup.write_bytes(b"".join(changed))
            assert gzip.decompress(backup.read_bytes())
            refused(backup)
    backup.write_bytes(b"".join([*members[:2], members[3], members[2], *members[4:]]))
    refused(backup)


def test_something_after_the_end_is_found(backup: Path) -> None:
    backup.write_bytes(backup.read_bytes() + gzip.compress(b"more"))
    refused(backup)


def test_verifying_ends_when_it_is_asked_to(backup: Path) -> None:
    stop = Stop()
    stop.ask()
    with pytest.raises(Stopped):
        verify(backup, stop)
