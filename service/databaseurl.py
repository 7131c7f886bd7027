"""Checks the settings that are URLs of databases: DATABASE_URL, LEDGER_URL and others."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

DRIVERS = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
}


def async_url(url: str) -> str:
    """The URL with an async driver: bare `postgres://`, `postgresql://` and `sqlite://` are
    rewritten.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the text of the error may contain a part of the password
        raise ValueError(
            "not a database URL, which looks like postgresql://user@host/name or sqlite:///./app.db"
        ) from None
    if "@" in (parsed.host or ""):
        raise ValueError("an @ in the password is read as the end of the password: write it as %40")
    parsed = parsed.set(drivername=DRIVERS.get(parsed.drivername, parsed.drivername))
    # libpq's name of `ssl`
    if parsed.drivername == "postgresql+asyncpg" and (mode := parsed.query.get("sslmode")):
        parsed = parsed.difference_update_query(["sslmode"]).update_query_dict({"ssl": mode})
    _refuse_driver(parsed)
    return parsed.render_as_string(hide_password=False)


def _refuse_driver(url: URL) -> None:
    try:
        is_async = url.get_dialect().get_async_dialect_cls(url).is_async
    except NoSuchModuleError:
        raise ValueError(
            f"unknown driver {url.drivername}://; allowed: postgresql:// or sqlite://"
        ) from None
    if not is_async:
        raise ValueError(
            f"the driver of {url.drivername}:// is not async; allowed: postgresql:// or sqlite://"
        )


def ledger_database_url(url: str) -> str:
    """The URL, if the ledger can be in such a database. Raises ValueError."""
    if make_url(url).get_backend_name() not in ("postgresql", "sqlite"):
        raise ValueError(
            "the ledger can't be in such a database; allowed: postgresql:// or sqlite://"
        )
    return url


DatabaseUrl = Annotated[str, AfterValidator(async_url)]
LedgerUrl = Annotated[DatabaseUrl, AfterValidator(ledger_database_url)]
