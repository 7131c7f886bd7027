"""A machine that is gone never ends its connections, so the kernel has to ask it whether it is
still there.
"""

from __future__ import annotations

import socket
from typing import Any

from sqlalchemy import make_url

from batch_system.backup.postgresql import snapshot
from batch_system.database.engine import Database
from batch_system.database.postgresql_connections import TCP_OPTIONS
from batch_system.database.urls import connect_arguments
from batch_system.testing.postgres import PostgresServer
from tests.faults.network import proxy_before


def is_asked(connection: Any) -> bool:
    """Whether the kernel checks the other end of this connection of asyncpg as often as it
    should.
    """
    ours = connection._transport.get_extra_info("socket")
    known = {
        getattr(socket, name): value for name, value in TCP_OPTIONS.items() if hasattr(socket, name)
    }
    return ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0 and known == {
        option: ours.getsockopt(socket.IPPROTO_TCP, option) for option in known
    }


async def test_the_machine_of_a_server_is_asked_whether_it_is_still_there(
    postgres_server: PostgresServer, postgres_database: str
) -> None:
    with proxy_before(postgres_server, 1) as network:
        url = make_url(postgres_database).set(host="127.0.0.1", port=network.ports[0], query={})
        database = Database(url.render_as_string(hide_password=False), setting="LEDGER_URL")
        async with database.engine.connect() as connection:
            assert is_asked((await connection.get_raw_connection()).driver_connection)
        await database.dispose()
        async with snapshot.connected(connect_arguments(url)) as connection:
            assert is_asked(connection)
