"""Makes the demonstration and serves it: the service goes on as node-a at the end of the story, and
node-b only beats. Meanwhile a process of its own adds the time before the last night.
"""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from batch_system import clock
from batch_system.batch.firing.apscheduler import follow_shifted_clock
from batch_system.batch.night.keeper import LONGEST_SECONDS, TallyKeeper
from batch_system.batch.nodes import node as node_module
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.database.types import stamp
from batch_system.demo import files, making
from batch_system.demo.story import DONE, EXPORT, RATE
from batch_system.demo.times import NOW
from batch_system.server import deploys, uvicorn
from batch_system.settings.reading import get_settings

BEAT_SECONDS = 2.0
AGAIN_SECONDS = 1.0
"""How soon it is asked again whether the time before the night is filled in."""


def show(folder: Path, port: int | None) -> None:
    """Make the demonstration in a folder, and serve it until SIGTERM or SIGINT.

    Raises BatchError if the folder can't be taken.
    """
    files.write(folder)
    gc.disable()  # nearly all objects stay until the databases are made
    asyncio.run(making.make_night(folder))
    gc.enable()
    TaskRegistry.clear()
    clock.shift_to(NOW)
    follow_shifted_clock()
    with files.in_folder(folder), _filled(folder) as filling, _continued(folder, filling):
        uvicorn.serve(get_settings(), port=port)


@contextmanager
def _filled(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Within the block a process fills in the time before the night. It ends with the block."""
    command = [sys.executable, "-m", "batch_system.demo.filling", str(folder)]
    filling = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield filling
    finally:
        filling.terminate()
        filling.wait()


@contextmanager
def _continued(folder: Path, filling: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within the block the service of this process is node-a of the story, which has run since its
    start: so there is no start, and no change of settings. It counts no slots while their runs are
    still filled in.
    """
    keep_up = TallyKeeper.keep_up

    async def keep_up_once_filled(keeper: TallyKeeper) -> float:
        if filling.poll() is None:
            asyncio.get_running_loop().call_later(AGAIN_SECONDS, keeper.wake)
            return LONGEST_SECONDS
        return await keep_up(keeper)

    node_a, node_b = _living(folder)
    stopping = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(folder / "ledger.db", node_b, stopping), daemon=True
    )
    with (
        patch.object(node_module, "new_id", lambda: node_a),
        patch.object(deploys, "record_start", _nothing),
        patch.object(TallyKeeper, "keep_up", keep_up_once_filled),
    ):
        beating.start()
        try:
            yield
        finally:
            stopping.set()
            beating.join(BEAT_SECONDS)


async def _nothing(*_: Any) -> None:
    """A service that goes on records no start."""


def _living(folder: Path) -> tuple[str, str]:
    """The ids of node-a and node-b at the end of the story."""
    with sqlite3.connect(folder / "ledger.db") as connection:
        rows = connection.execute(
            "SELECT id FROM batch_nodes WHERE stopped_at IS NULL ORDER BY host"
        ).fetchall()
    (node_a,), (node_b,) = rows
    return node_a, node_b


def _beat(ledger: Path, node: str, stopping: threading.Event) -> None:
    """Let node-b beat, and the export make progress, until the service stops."""
    begin = clock.now()
    while not stopping.wait(BEAT_SECONDS):
        now = clock.now()
        done = DONE + int(RATE * (now - begin).total_seconds())
        connection = sqlite3.connect(ledger, timeout=10)
        with connection:
            connection.execute(
                "UPDATE batch_nodes SET beats = beats + 1, seen_at = ? WHERE id = ?",
                (stamp(now, "sqlite"), node),
            )
            connection.execute(
                "UPDATE batch_runs SET count = ?, progress_at = ? "
                "WHERE task = 'warehouse_export' AND slot = ? AND +state = 'running'",
                (done, stamp(now, "sqlite"), stamp(EXPORT, "sqlite")),
            )
        connection.close()
