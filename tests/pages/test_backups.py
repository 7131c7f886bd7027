"""What can be done with backups on their page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import text

from batch_system.config import get_settings
from batch_system.database.session import get_db
from batch_system.operations.backups.backups import Backups
from tests.pages.conftest import People


@pytest.fixture
async def name(people: People) -> str:
    """The name of a new backup."""
    async with get_db() as db:
        await db.execute(
            text("CREATE TABLE parcels (id INTEGER PRIMARY KEY, address TEXT NOT NULL)")
        )
        await db.execute(text("INSERT INTO parcels VALUES (1, 'here'), (2, 'there')"))
        await db.commit()
    return Path((await Backups(people.served.operations.context).create()).path).name


async def test_a_backup_is_verified_pinned_and_unpinned(people: People, name: str) -> None:
    page = await people.admin.page("/backups")
    assert page.count(f"<code>{name}</code>") == 1 and "Kept until now" in page
    assert f"Verify {name}?" in await people.operator.page(f"/backups/{name}/verify")
    await people.operator.send(f"/backups/{name}/verify")
    await people.operator.send(f"/backups/{name}/pin", 403)
    await people.admin.send(f"/backups/{name}/pin")
    assert f'aria-label="Unpin {name}"' in await people.admin.page("/backups")
    await people.admin.send(f"/backups/{name}/unpin")
    assert f'aria-label="Pin {name}"' in await people.admin.page("/backups")
    assert 'aria-label="Pin' not in await people.operator.page("/backups")
    await people.viewer.send(f"/backups/{name}/verify", 403)


async def test_a_damaged_backup_is_said_and_marked(people: People, name: str) -> None:
    file = get_settings().BACKUP_DIR / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    answer = await people.operator.send(f"/backups/{name}/verify", 500)
    assert "is damaged" in answer.text
    page = await people.viewer.page("/backups")
    assert 'class="f-failed"' in page and "1 failed a check" in re.sub(r"\s+", " ", page)


async def test_differences_are_counted(people: People, name: str) -> None:
    async with get_db() as db:
        await db.execute(text("INSERT INTO parcels VALUES (3, 'far')"))
        await db.execute(text("UPDATE parcels SET address = 'gone' WHERE id = 1"))
        await db.commit()
    assert f"<option>{name}</option>" in await people.operator.page("/backups/diff")
    page = await people.operator.page(f"/backups/diff?from={name}")
    [row] = [row for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL) if "parcels" in row]
    assert re.findall(r'<td class="num">([^<]*)</td>', row) == ["2", "3", "1", "1", "0"]
    assert "no backup" in await people.operator.page(
        "/backups/diff?from=backup_20200101_000000.backup.gz", 404
    )


async def test_a_backup_is_downloaded_by_an_admin_which_is_recorded(
    people: People, name: str
) -> None:
    file = get_settings().BACKUP_DIR / name
    answer = await people.admin.client.get(f"/backups/{name}/download")
    assert answer.content == file.read_bytes()
    assert answer.headers["content-disposition"] == f'attachment; filename="{name}"'
    await people.operator.page(f"/backups/{name}/download", 403)
    assert f"{name}" in await people.admin.page("/changes?action=backup.download")


@pytest.mark.parametrize(
    "given",
    [
        "..%2f..%2fledger.db",
        "ledger.db",
        ".env",
        "x" * 200,
        "backup_20200101_000000.backup.gz",
        "%2e%2e",
    ],
)
async def test_no_other_file_is_downloaded(people: People, given: str) -> None:
    answer = await people.admin.client.get(f"/backups/{given}/download")
    assert answer.status_code == 404


async def test_a_link_in_the_folder_is_not_followed(
    people: People, name: str, tmp_path: Path
) -> None:
    folder = get_settings().BACKUP_DIR
    (tmp_path / "secret").write_text("a secret")
    link = "backup_20200101_000000.backup.gz"
    (folder / link).symlink_to(tmp_path / "secret")
    assert "a secret" not in await people.admin.page(f"/backups/{link}/download", 404)
