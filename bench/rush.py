"""What processes.py and peers.py share: many jobs for some processes at once, and how long they
take over them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
from services import Worker, cpu_seconds

from batch_system.testing.postgres import OwnServer, PostgresServer

LOOK_SECONDS = 0.02
MOST_SECONDS = 600.0

NOTING = '''
import os, time

noted = []

def note_first():
    """In a file, when this process began its first job."""
    if not noted:
        noted.append(time.monotonic())
        with open(f"first-{os.getpid()}", "w") as file:
            file.write(str(noted[0]))
'''


@dataclass(frozen=True)
class Rush:
    """So many seconds from the first line of the first job until none was left; the cores that were
    busy meanwhile.
    """

    seconds: float
    workers: float
    server: float | None


async def rush(
    put: Awaitable[Any],
    active: str,
    url: str,
    folder: Path,
    workers: Sequence[Worker],
    server: PostgresServer,
) -> Rush:
    """`put` queues all jobs with one COMMIT, `active` is the query for one that is left."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    await put
    began_at, before = time.monotonic(), _cpu(workers, server)
    while await connection.fetchval(active) is not None:
        if time.monotonic() > began_at + MOST_SECONDS:
            raise SystemExit(
                f"jobs are left after {MOST_SECONDS:.0f} s:\n{workers[0].log.read_text()[-5000:]}"
            )
        await asyncio.sleep(LOOK_SECONDS)
    ended_at, after = time.monotonic(), _cpu(workers, server)
    await connection.close()
    seconds = ended_at - min(float(path.read_text()) for path in folder.glob("first-*"))
    # Idle, they use nothing.
    ours, theirs = ((now - then) / seconds for now, then in zip(after, before, strict=True))
    return Rush(seconds, ours, theirs if isinstance(server, OwnServer) else None)


def cores(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def _cpu(workers: Sequence[Worker], server: PostgresServer) -> tuple[float, float]:
    """Seconds of the workers, and of the server: of its first process, of those that it started and
    of ended ones.
    """
    ours = sum(cpu_seconds(worker.pid) for worker in workers)
    if not isinstance(server, OwnServer):
        return ours, 0.0
    first = int((server.directory / "data/postmaster.pid").read_text().split()[0])
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return ours, cpu_seconds(first, with_ended_children=True) + sum(
        cpu_seconds(int(pid)) for pid in children
    )
