"""A database's URL: as text without its password, and as the arguments of a driver of its own."""

from __future__ import annotations

from sqlalchemy.engine import URL

ONLY_SQLALCHEMYS = ("async_creator_fn", "prepared_statement_cache_size", "prepared_statement_name_func")


def safe_url(url: URL) -> str:
    """A database's address for people, without a password."""
    return url.set(query={}).render_as_string(hide_password=True)


def connect_arguments(url: URL) -> dict[str, object]:
    """Exactly those that get_db()'s connections have: hosts, sockets, ssl and the rest of the query."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    return {name: value for name, value in arguments.items() if name not in ONLY_SQLALCHEMYS}
