"""Checks the settings that are URLs: those of databases, such as DATABASE_URL, and BACKUP_URL,
which is that of a bucket, or of a folder other than BACKUP_DIR.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from batch_system.errors import InvalidSetting

FILE = "file://"
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
    # libpq's name for `ssl`.
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


def refuse_session_options(**urls: str | None) -> None:
    """Raises ValueError if one of these URLs, by the names of their settings, has options for the
    session.
    """
    for name, url in urls.items():
        if url is not None and "options" in make_url(url).query:
            raise ValueError(
                f"{name} has `options`, which a pooler in transaction mode does not keep for its "
                "clients: leave them out, and set them for the role, as in "
                "ALTER ROLE app SET search_path = shop"
            )


def with_login_of(url: str, other: str) -> str:
    """The URL `other` with the user and the password of `url`."""
    login = make_url(url)
    whole = make_url(other).set(username=login.username, password=login.password)
    return whole.render_as_string(hide_password=False)


def ledger_database_url(url: str) -> str:
    """The URL, if such a database can hold the ledger. Raises ValueError."""
    if make_url(url).get_backend_name() not in ("postgresql", "sqlite"):
        raise ValueError(
            "the ledger can't be in such a database; allowed: postgresql:// or sqlite://"
        )
    return url


def place_url(url: str) -> str:
    """The URL without a final slash. Raises ValueError, which does not contain the value, because
    it may contain a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("s3", "file") or not rest.strip("/"):
        raise ValueError(
            "not the URL of a place for backups; allowed: s3://bucket/prefix or file:///folder"
        )
    if scheme == "file":
        folder_of(url)
    elif any(mark in rest for mark in "@?#"):
        raise ValueError(
            "s3://bucket/prefix may have only a bucket and a prefix; keys, the endpoint and the "
            "region are read from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL and "
            "AWS_REGION"
        )
    return url.rstrip("/")


def folder_of(url: str) -> Path:
    """The folder of a file URL: an absolute path, percent-decoded. Raises ValueError without the
    value.
    """
    host, slash, rest = url.removeprefix(FILE).partition("/")
    if host or not slash:
        raise ValueError(
            "not the URL of a folder, which begins with three slashes; allowed: file:///folder"
        )
    path = os.fsdecode(unquote_to_bytes(f"/{rest}"))
    if "?" in rest or "#" in rest or not path.isprintable():
        raise ValueError(
            "not the URL of a folder: write ? as %3F and # as %23; allowed: file:///folder"
        )
    return Path(path)


def refuse_one_place(folder: Path, url: str) -> None:
    """Raise InvalidSetting if `url` is the folder BACKUP_DIR itself, even by another name or
    through a link.
    """
    if not url.startswith(FILE):
        return
    other = folder_of(url)
    is_same = os.path.realpath(folder) == os.path.realpath(other)
    if not is_same:
        with suppress(OSError):  # one of the folders does not exist
            is_same = os.path.samefile(folder, other)
    if is_same:
        raise InvalidSetting(
            f"setting BACKUP_URL: it is the folder of BACKUP_DIR ({folder}), and a copy there "
            "would be the backup itself; allowed: another folder, or s3://bucket/prefix"
        )


DatabaseUrl = Annotated[str, AfterValidator(async_url)]
LedgerUrl = Annotated[DatabaseUrl, AfterValidator(ledger_database_url)]
PlaceUrl = Annotated[str, AfterValidator(place_url)]
