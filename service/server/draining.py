"""The end of the work of a service: its runs end or are interrupted, and its row in the ledger says
that it drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from service.batch.execution.local_engine import LocalEngine
from service.batch.nodes.node import Node
from service.concurrency.background import Background
from service.database.engine import Database
from service.server.probes import write_if_reachable

DRAIN_NOTE_SECONDS = 1.0
"""After its drain a service waits this long at most until the begin of the drain is written to the
ledger.
"""


async def end_work(
    ledger: Database, node: Node, engine: LocalEngine, parts: Iterable[Background], seconds: float
) -> None:
    """End all runs. A ledger that does not answer does not make this take longer than the drain.

    `parts`: what else is to be stopped. `seconds`: how long runs may go on.
    """
    writing = asyncio.create_task(write_if_reachable(ledger, node.drain))
    stops = asyncio.gather(*(part.stop() for part in parts))
    is_over = await engine.drain(seconds)
    await stops
    if is_over:
        await engine.drain(0)  # runs that were launched by a firing that was in progress
        await asyncio.wait([writing], timeout=DRAIN_NOTE_SECONDS)
    writing.cancel()
    await asyncio.wait([writing])
