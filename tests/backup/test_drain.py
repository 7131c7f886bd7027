"""A service that stops in the middle of a backup."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.backup.contents import connected, until
from tests.processes import ROOT, UVICORN, batch, process


async def test_a_drain_ends_the_backup_without_a_file_and_the_next_service_makes_it(
    postgres_database: str, tmp_path: Path
) -> None:
    settings = {
        "DATABASE_URL": postgres_database,
        "TASKS_DIR": str(ROOT / "tasks"),
        "DRAIN_SECONDS": "0.5",
    }
    folder = tmp_path / "backups"

    async def has_begun() -> bool:
        return any(folder.glob(".backup_*.partial"))

    async def is_gone() -> bool:
        return not any(folder.iterdir())

    async def is_made() -> bool:
        """Whether the backup is complete: for a moment, the file has both its final and its partial
        name.
        """
        return any(folder.glob("backup_*.backup.gz")) and not await has_begun()

    with process(tmp_path, UVICORN, settings) as running:
        await asyncio.to_thread(running.wait_until_ready)
        async with connected(postgres_database) as holder, holder.transaction():
            # The backup waits for this lock.
            await holder.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            queued = await asyncio.to_thread(
                batch, tmp_path, "run", "backup", "--queue", settings=settings
            )
            assert queued.returncode == 0, queued.stderr
            await until(has_begun)
            await asyncio.to_thread(running.stop)
            await until(is_gone)  # the worker may remove it after the service has ended
    with process(tmp_path, UVICORN, settings):
        await until(is_made)
    assert len(list(folder.iterdir())) == 1
