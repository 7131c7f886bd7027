"""The URL of a database as text without its password, and as arguments for its driver."""

from __future__ import annotations

from sqlalchemy.engine import URL

ONLY_SQLALCHEMYS = ("async_creator_fn", "prepared_statement_cache_size", "prepared_statement_name_func")


def safe_url(url: URL) -> str:
    """The URL as text for people, without its password and its query."""
    return url.set(query={}).render_as_string(hide_password=True)


def connect_arguments(url: URL) -> dict[str, object]:
    """The arguments for asyncpg that SQLAlchemy would pass: hosts, sockets, ssl and the rest of the query."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    return {name: value for name, value in arguments.items() if name not in ONLY_SQLALCHEMYS}
