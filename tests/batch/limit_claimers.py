"""A process that claims and ends runs of a task with a limit until it is killed. On SIGUSR1 it
freezes itself after its next claim, before the commit.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterable

from sqlalchemy.exc import DBAPIError, IntegrityError

from batch_system import Limit
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.queue import claiming
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.turns import Turns
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.test_limits import limited
from tests.batch.test_runs import ending, finish

NUMBER, TOTAL, ROOM = 2, 20, 10
COMMAND = "from tests.batch.limit_claimers import main; main()"


def mail() -> Task:
    return limited(Limit(NUMBER, key="tenant", total=TOTAL))


def main() -> None:
    """The arguments: the URL of the ledger, and the id of the node."""
    asyncio.run(_claim_until_killed(*sys.argv[1:]))


async def _claim_until_killed(url: str, node: str) -> None:
    ledger = Database(url, setting="LEDGER_URL", pool_size=2)
    tasks, turns = {"mail": mail()}, Turns()
    has_to_freeze = []
    signal.signal(signal.SIGUSR1, lambda *_: has_to_freeze.append(True))
    begun: list[Claimed] = []
    apart = False
    while True:
        try:
            async with ledger.engine.begin() as connection:
                room = Capacity(ROOM - len(begun), ROOM)
                claimed, _ = await claiming.take(connection, tasks, node, room, apart, turns)
                if claimed and has_to_freeze:
                    has_to_freeze.clear()
                    _say(frozen=node)
                    os.kill(os.getpid(), signal.SIGSTOP)
            _say(begun=tenants_of(claimed), at=time.monotonic())
            begun += claimed
            random.shuffle(begun)
            ended, begun = begun[:6], begun[6:]
            await finish(ledger, *map(ending, ended))
            _say(ended=tenants_of(ended), at=time.monotonic())
            apart = False
        except IntegrityError:  # as the engine does
            apart = True
        except DBAPIError as error:  # its transaction was ended while it was frozen
            _say(failed=str(error)[:200])
        if not begun:
            await asyncio.sleep(0.02)


def tenants_of(runs: Iterable[Claimed]) -> list[str]:
    """The keys of these runs."""
    return [(run.params or {})["tenant"] for run in runs]


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)
