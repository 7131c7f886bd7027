"""Serves the demonstration: the service goes on as node-a at the end of the story, and node-b only
beats.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from batch_system import clock
from batch_system.batch.nodes import node as node_module
from batch_system.batch.nodes.process_lock import PREFIX
from batch_system.cli import main
from batch_system.database.types import stamp
from batch_system.server import deploys
from tests.demo import files
from tests.demo.story import DONE, EXPORT, RATE
from tests.demo.times import NOW
from tests.faults.wrong_clock import set_wrong

MADE = "made"
"""The folder in which the databases stay as they were made."""
DATABASES = ("app.db", "ledger.db")
BEAT_SECONDS = 2.0


def keep(folder: Path) -> None:
    """Keep copies of the databases as they were made."""
    (folder / MADE).mkdir(exist_ok=True)
    for name in DATABASES:
        shutil.copyfile(folder / name, folder / MADE / name)


def command(folder: Path, arguments: Sequence[str]) -> None:
    """Execute a `batch` command in the folder, at the end of the story. `serve` begins with the
    databases as made.
    """
    os.environ.update(files.environment(folder))
    os.chdir(folder)
    is_serve = arguments[0] == "serve"
    if is_serve:
        _reset(folder)
    offset = folder / f"clock-{os.getpid()}"
    offset.write_text(f"{(NOW - datetime.now(UTC)).total_seconds()}")
    set_wrong(offset)
    sys.argv = ["batch", *arguments]
    try:
        if is_serve:
            _serve(folder)
        else:
            main()
    finally:
        offset.unlink(missing_ok=True)


def _reset(folder: Path) -> None:
    files.refuse_running(folder)
    for old in (*folder.glob("*.db*"), *folder.glob(f"{PREFIX}*"), *folder.glob("clock-*")):
        old.unlink()
    for name in DATABASES:
        shutil.copyfile(folder / MADE / name, folder / name)


def _serve(folder: Path) -> None:
    """Serve as node-a of the story, which has run since its start: so there is no start, and no
    change of settings.
    """
    node_a, node_b = _living(folder)
    stopping = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(folder / "ledger.db", node_b, stopping), daemon=True
    )
    with (
        patch.object(node_module, "new_id", lambda: node_a),
        patch.object(deploys, "record_start", _nothing),
    ):
        beating.start()
        try:
            main()
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
