"""A forked child of a service keeps no connection open that a server would wait for."""

from __future__ import annotations

import os
import signal

from sqlalchemy import text

from batch_system.database.engine import Database


async def test_a_transaction_ends_with_the_process_that_began_it_although_a_forked_child_lives(
    postgres_database: str,
) -> None:
    database = Database(postgres_database, setting="LEDGER_URL")
    async with database.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id int)"))
    async with database.engine.connect() as connection:
        await connection.execute(text("LOCK t"))
        child = os.fork()
        if child == 0:
            signal.pause()
        try:
            ours = (await connection.get_raw_connection()).driver_connection
            ours._transport.abort()  # as a kill does: without a message
            async with database.engine.begin() as other:
                await other.execute(text("SET lock_timeout = '20s'"))
                await other.execute(text("LOCK t"))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        await connection.invalidate()
    await database.dispose()


async def test_the_parent_of_a_forked_child_can_still_use_its_connections(
    postgres_database: str,
) -> None:
    database = Database(postgres_database, setting="LEDGER_URL")
    async with database.engine.begin() as connection:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        assert await connection.scalar(text("SELECT 1")) == 1
    await database.dispose()
