"""What bench/backups.py starts: a process with an event loop like a service's, beside which a
backup is made.

    python bench/beside.py idle|backup FOLDER

The loop's only work is to sleep for 5 ms, over and over, and to note how late it wakes. `backup`
makes a backup of DATABASE_URL in FOLDER meanwhile; `idle` makes none. Prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from batch_system.backup import create_backup
from batch_system.backup.file.progress import BackupProgress

NAP_SECONDS = 0.005
IDLE_SECONDS = float(os.environ.get("BENCH_IDLE_SECONDS", "5"))


class Lateness:
    def __init__(self) -> None:
        self.found: list[float] = []

    async def watch(self) -> None:
        while True:
            began_at = time.perf_counter()
            await asyncio.sleep(NAP_SECONDS)
            self.found.append((time.perf_counter() - began_at - NAP_SECONDS) * 1000)

    def at(self, share: float) -> float:
        ordered = sorted(self.found)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def make_backup(folder: Path) -> dict[str, Any]:
    written_at = 0.0

    def hear(progress: BackupProgress) -> None:
        nonlocal written_at
        if progress.stage == "verifying" and not written_at:
            written_at = time.perf_counter()

    began_at, began_with = time.perf_counter(), cpu_of_children()
    path = await create_backup(folder, on_progress=hear)
    ended_at = time.perf_counter()
    return {
        "written": written_at - began_at,
        "verified": ended_at - began_at,
        "cpu": cpu_of_children() - began_with,
        "bytes": path.stat().st_size,
        "path": str(path),
    }


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def main(mode: str, folder: Path) -> None:
    lateness = Lateness()
    await asyncio.sleep(0.2)  # what the start itself costs the loop is not meant
    watching = asyncio.create_task(lateness.watch())
    if mode == "idle":
        await asyncio.sleep(IDLE_SECONDS)
        found: dict[str, Any] = {}
    else:
        found = await make_backup(folder)
    watching.cancel()
    late = {"p50": lateness.at(0.5), "p99": lateness.at(0.99), "max": max(lateness.found)}
    print(json.dumps({**found, "late": late, "naps": len(lateness.found)}))


# `make bench` starts each file here by itself too.
if __name__ == "__main__" and len(sys.argv) == 3:
    uvloop.run(main(sys.argv[1], Path(sys.argv[2])))
