"""A process that starts runs which are merged, until it is killed or told to stop, and writes down
what it asked for and what was committed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import time
from pathlib import Path
from typing import Any

from batch_system import BaseTask, TaskRegistry, get_db, start

DEBOUNCE, AT_MOST, WINDOW = 0.3, 1.5, 0.4
KEYS: dict[str, dict[str, Any]] = {
    "a": {"debounce": DEBOUNCE, "at_most": AT_MOST},
    "b": {"debounce": DEBOUNCE, "at_most": AT_MOST},
    "w": {"once_in": WINDOW},
}


class Reindex(BaseTask):
    name, schedule, overlap = "reindex", None, "allow"

    async def run(self, key: str, starter: str, number: int) -> None:
        pass


TASKS = f"from batch_system import BaseTask\n\n\n{inspect.getsource(Reindex)}"
COMMAND = "from tests.batch.starters import main; main()"


def main() -> None:
    """STARTER: its name; one that begins with `s` starts in sessions of the application."""
    TaskRegistry.register(Reindex)
    asyncio.run(_start_until_stopped(os.environ["STARTER"]))


async def _start_until_stopped(name: str) -> None:
    file = Path(f"{name}.lines")
    number = file.read_text().count("asked") if file.exists() else 0
    with file.open("a", buffering=1) as lines:
        while not Path("stop").exists():
            number += 1
            key = random.choice(sorted(KEYS))
            lines.write(f"asked {number} {key} {time.time()}\n")
            params = {"key": key, "starter": name, "number": number}
            given = {"key": key, "params": params, **KEYS[key]}
            if name.startswith("s"):
                async with get_db() as db:
                    await start(Reindex, **given, session=db)
                    await db.commit()
            else:
                await start(Reindex, **given)
            lines.write(f"committed {number} {key} {time.time()}\n")
            await asyncio.sleep(random.choice([0.02, 0.05, 0.1, 0.5]) * random.random())
