"""Refuses a test's connections to the real databases, which an author's engine may open by mistake.
Alone, because it works without the fixture.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Engine, event, make_url

from batch_system.errors import BatchError, InvalidSetting
from batch_system.settings.reading import get_settings

Address = tuple[str, ...]


def urls() -> list[str]:
    """The URLs of the databases of the present settings; none if the settings can't be read."""
    try:
        settings = get_settings()
    except InvalidSetting:
        return []
    return [settings.DATABASE_URL, settings.ledger_url]


@contextmanager
def refused(real: Collection[str], own: Collection[str]) -> Iterator[None]:
    """Make each connection that an engine of SQLAlchemy opens to a real database raise BatchError.

    `own`: the URLs of the test's databases, which are the real ones for settings that are relative
    to its folder.
    """
    addresses = {_address_of(make_url(url)) for url in real} - {
        _address_of(make_url(url)) for url in own
    }

    def refuse(dialect: Any, _: Any, arguments: Any, parameters: Any) -> None:
        if _address_in(dialect, arguments, parameters) in addresses:
            raise BatchError(
                "a test with the fixture batch opens the real database, by an engine that is not "
                "of get_db(): make the engine of the test of batch.database_url (docs/testing.md, "
                "An engine of your own)"
            )

    event.listen(Engine, "do_connect", refuse)
    try:
        yield
    finally:
        event.remove(Engine, "do_connect", refuse)


def _address_of(url: URL) -> Address:
    if url.get_backend_name() == "sqlite":
        return ("sqlite", os.path.realpath(url.database or ""))
    return _of_server(url.get_backend_name(), url.host, url.port, url.database)


def _address_in(dialect: Any, arguments: Any, parameters: Any) -> Address:
    """The database that the driver is about to connect to, by the arguments that it gets."""
    if dialect.name == "sqlite":
        return ("sqlite", os.path.realpath(arguments[0] if arguments else ""))
    name = parameters.get("database") or parameters.get("dbname")
    return _of_server(dialect.name, parameters.get("host"), parameters.get("port"), name)


def _of_server(kind: str, host: Any, port: Any, name: Any) -> Address:
    return (kind, str(host or "localhost"), str(port or ""), str(name or ""))
