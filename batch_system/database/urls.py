"""The URL of a database as text without its password, and as arguments for its driver."""

from __future__ import annotations

from sqlalchemy.engine import URL

ONLY_SQLALCHEMYS = (
    "async_creator_fn",
    "prepared_statement_cache_size",
    "prepared_statement_name_func",
)


def safe_url(url: URL) -> str:
    """The URL as text for people, without its password and its query."""
    return url.set(query={}).render_as_string(hide_password=True)


def split_options(url: URL) -> tuple[URL, dict[str, str]]:
    """The URL without libpq's `options` (`?options=-csearch_path=shop`), and the server settings
    that replace them.

    asyncpg has no parameter of that name. The server takes the text as it is, when the connection
    begins.
    """
    if url.drivername != "postgresql+asyncpg" or not (given := url.query.get("options")):
        return url, {}
    options = given if isinstance(given, str) else " ".join(given)
    return url.difference_update_query(["options"]), {"options": options}


def connect_arguments(url: URL) -> dict[str, object]:
    """The arguments for asyncpg that SQLAlchemy would pass: hosts, sockets, ssl and the rest of the
    query.
    """
    bare, settings = split_options(url)
    _, arguments = bare.get_dialect()().create_connect_args(bare)
    kept = {name: value for name, value in arguments.items() if name not in ONLY_SQLALCHEMYS}
    return {**kept, "server_settings": settings}
