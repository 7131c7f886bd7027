"""The bad network of the fault suite, in front of a real PostgreSQL. About 3 s."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest
from sqlalchemy import make_url

from batch_system import clock
from batch_system.testing.postgres import PostgresServer
from tests.faults.network import Proxy, proxy_before

LOST = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)


@pytest.fixture(scope="module")
def network(postgres_server: PostgresServer) -> Iterator[Proxy]:
    with proxy_before(postgres_server, 2) as made:
        yield made


@pytest.fixture
async def through(network: Proxy, postgres_database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection through its first door, with a table to write into."""
    connection = await connect(network, 0, postgres_database)
    await connection.execute("CREATE TABLE t (i int)")
    yield connection
    connection.terminate()


async def connect(network: Proxy, door: int, url: str) -> asyncpg.Connection:
    made = make_url(url)
    return await asyncpg.connect(
        host="127.0.0.1",
        port=network.ports[door],
        user="postgres",
        database=made.database,
        ssl=False,
    )


async def insert(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await connection.execute("INSERT INTO t VALUES (1)")


async def rows(network: Proxy, url: str) -> int:
    """The number of rows, read through the second port of the proxy."""
    connection = await connect(network, 1, url)
    count: int = await connection.fetchval("SELECT count(*) FROM t")
    await connection.close()
    return count


@pytest.mark.parametrize(("command", "there"), [("lose", 1), ("drop", 0)])
async def test_a_commit_is_done_without_a_reply_or_not_at_all(
    network: Proxy, postgres_database: str, through: asyncpg.Connection, command: str, there: int
) -> None:
    network.tell(0, command, 60, 1.0)
    with pytest.raises(LOST):
        await insert(through)
    assert await rows(network, postgres_database) == there
    assert network.tell("all", "count")[command] == 1


async def test_a_cut_ends_the_connections_of_one_door_and_leaves_it_open(
    network: Proxy, postgres_database: str, through: asyncpg.Connection
) -> None:
    other = await connect(network, 1, postgres_database)
    network.tell(0, "cut", 1.0)
    with pytest.raises(LOST):
        await through.fetchval("SELECT 1")
    assert await other.fetchval("SELECT 1") == 1
    await (await connect(network, 0, postgres_database)).close()
    await other.close()


async def test_a_door_that_refuses_takes_nobody_for_its_time(
    network: Proxy, postgres_database: str, through: asyncpg.Connection
) -> None:
    network.tell(0, "refuse", 60)
    with pytest.raises(LOST):
        await through.fetchval("SELECT 1")
    with pytest.raises(LOST):
        await connect(network, 0, postgres_database)
    network.tell(0, "refuse", 0.3)
    await asyncio.sleep(0.3)
    await (await connect(network, 0, postgres_database)).close()


async def test_what_is_held_comes_late_and_is_not_lost(
    network: Proxy, postgres_database: str, through: asyncpg.Connection
) -> None:
    began = clock.monotonic()
    network.tell(0, "hold", 0.4)
    assert await through.fetchval("SELECT 7") == 7
    assert clock.monotonic() >= began + 0.4
