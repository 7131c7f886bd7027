"""Restores a backup into another empty database of the same kind, for `batch backup restore
--into`.

Neither the application's database nor the ledger is touched, so a service may run meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.engine import URL, make_url

from service.backup.file.reader import Source
from service.backup.restoring.plan import RestorePlan
from service.backup.restoring.restore import planned
from service.backup.restoring.scratch import address
from service.database.migrate import History
from service.database.urls import safe_url
from service.errors import BackupError, InvalidParameters
from service.settings.settings import Settings
from service.settings.urls import async_url


async def planned_into(
    settings: Settings, source: Source, into: str, histories: Sequence[History]
) -> tuple[str, RestorePlan]:
    """The URL to restore by, and the plan. Raises InvalidParameters and BackupError if the database
    is not fit.
    """
    url = _other_url(settings, into)
    plan = await planned(source, url, histories=histories, example=example_of(settings))
    if not plan.is_new or any(plan.rows.values()):
        raise BackupError(
            f"nothing was restored: the database {plan.database} is not empty. Name an empty one"
        )
    return url, plan


def example_of(settings: Settings) -> Path | None:
    """The application's SQLite file, whose tables an empty file gets; None on PostgreSQL."""
    url = make_url(settings.DATABASE_URL)
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _other_url(settings: Settings, into: str) -> str:
    """The URL with its driver. Raises InvalidParameters if it is none, or names a database of the
    service.
    """
    try:
        url = async_url(into)
    except ValueError as error:
        raise InvalidParameters(f"the database to restore into is {error}") from None
    own = {"DATABASE_URL": settings.DATABASE_URL, "LEDGER_URL": settings.ledger_url}
    for setting, own_url in own.items():
        if _place(make_url(url)) == _place(make_url(own_url)):
            raise InvalidParameters(
                f"the database to restore into, {safe_url(make_url(url))}, is that of {setting}: "
                "name another one"
            )
    return url


def _place(url: URL) -> object:
    """What two URLs of one database have in common."""
    if url.get_backend_name() == "sqlite":
        return Path(url.database or ":memory:").resolve()
    return address(url)
