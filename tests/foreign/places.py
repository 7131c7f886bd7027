"""Where an application of somebody else has its tables, beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.pool import NullPool

PLACES = ("sqlite", "postgresql", "a schema", "a search path")
SCHEMA = "shop"


@dataclass(frozen=True)
class Place:
    """`settings`: of the processes of the application, those of its own Alembic among them."""

    name: str
    settings: dict[str, str]

    @classmethod
    def of(cls, name: str, postgresql: str, folder: Path) -> Self:
        """`postgresql`: the URL of an empty database. `folder`: for the files of SQLite."""
        if name == "sqlite":
            url = f"sqlite:///{folder / 'shop.db'}"
            return cls(name, {"DATABASE_URL": url, "ALEMBIC_URL": url})
        url = make_url(postgresql).set(drivername="postgresql")
        if name != "postgresql":
            _make_schema(url)
        if name == "a search path":
            url = url.update_query_dict({"options": f"-csearch_path={SCHEMA}"})
        settings = {
            "DATABASE_URL": _text(url),
            "ALEMBIC_URL": _text(url.set(drivername="postgresql+psycopg")),
        }
        return cls(name, settings | ({"SHOP_SCHEMA": SCHEMA} if name == "a schema" else {}))


def _text(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _make_schema(url: URL) -> None:
    with create_engine(
        url.set(drivername="postgresql+psycopg"), poolclass=NullPool
    ).begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {SCHEMA}"))
