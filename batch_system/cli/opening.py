"""How a command calls the operations: on a new event loop, with the databases of the settings."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from batch_system import console
from batch_system.cli.options import actor, wait_for
from batch_system.errors import ErrorKind, InvalidParameters, InvalidSetting
from batch_system.escaping import echoed

if TYPE_CHECKING:
    from batch_system.operations.asking.context import Loaded
    from batch_system.operations.backups.backups import Backups
    from batch_system.verbs.following import Operations

T = TypeVar("T")

LONGEST_TOKEN = 200
PAGE = 200
"""How many items a page has at most."""

FAILED, MISTAKE, OUT_OF_ORDER, INTERRUPTED = 1, 2, 3, 130

EXIT_CODES: dict[ErrorKind, int] = {
    "not_found": MISTAKE,
    "invalid": MISTAKE,
    "conflict": MISTAKE,
    "forbidden": MISTAKE,
    "unavailable": OUT_OF_ORDER,
    "damaged": OUT_OF_ORDER,
    "too_many": OUT_OF_ORDER,
}
"""The exit code of a command by the kind of its error. A failed run is not such an error; its exit
code is FAILED.
"""


def ask(
    work: Callable[[Operations], Awaitable[T]],
    *,
    needs_tasks: bool = True,
    log_level: str = "CRITICAL",
) -> T:
    """Call `work` with the operations of the user who has typed the command, and return its result.

    `needs_tasks`: whether a missing folder of tasks is an error, which is raised when a task is
    needed. Otherwise the command has no tasks then, so that it can show what is in the ledger on a
    machine without the folder.
    """
    from batch_system import logs

    logs.set_up(log_level, lazily=True)
    return wait_for(_call(work, needs_tasks))


_service: tuple[str, str | None] | None = None
"""The URL of the service that commands ask, and the token, as given by the options --url and
--token-file.
"""


def ask_service(url: str | None, token_file: Path | None) -> None:
    """Let the command ask the service at this URL instead of the ledger. Raises
    InvalidParameters.
    """
    global _service
    if url is None and token_file is not None:
        raise InvalidParameters("--token-file needs --url")
    _service = (url, _read_token(token_file) if token_file else None) if url is not None else None


def refuse_service(what: str) -> None:
    """Raises InvalidParameters if the user has given --url to a command that works on this
    machine.
    """
    if _service is not None:
        raise InvalidParameters(f"{what} works on this machine: call it there, without --url")


def backups_of(operations: Operations) -> Backups:
    """The backups of this machine. Raises InvalidParameters if the command asks a service."""
    from batch_system.operations.backups.backups import Backups

    return Backups(operations.context)


async def pages(operations: Operations, asked: Any, limit: int) -> list[Any]:
    """The pages of a list until they have `limit` items, or the list ends. `asked`: a verb with the
    fields `limit` and `after`; the first field of its answer holds the items.
    """
    found: list[Any] = []
    left = limit
    after: str | None = None
    while left > 0:
        more = {"limit": min(left, PAGE), "after": after}
        page = await operations(asked.model_copy(update=more))
        found.append(page)
        left -= len(getattr(page, next(iter(type(page).model_fields))))
        after = page.after
        if after is None:
            break
    return found


def _read_token(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            token = opened.read(LONGEST_TOKEN + 1).strip()
    except (OSError, UnicodeError) as error:
        raise InvalidParameters(
            f"--token-file {echoed(str(file))} can't be read: {error}"
        ) from None
    if not token:
        raise InvalidParameters(
            f"--token-file {echoed(str(file))} is empty; `batch token create` prints a token"
        )
    if len(token) > LONGEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidParameters(
            f"--token-file {echoed(str(file))}: it has to hold one token, and nothing else"
        )
    return token


async def _call(work: Callable[[Operations], Awaitable[T]], needs_tasks: bool) -> T:
    from batch_system.operations.operations import open_operations
    from batch_system.settings.reading import get_settings

    settings = get_settings()
    url, token = _service or (settings.BATCH_URL, None)
    if url is not None:
        from batch_system.remote.operations import remote_operations

        if token is None and settings.BATCH_TOKEN is not None:
            token = settings.BATCH_TOKEN.get_secret_value()
        if token is not None:
            _warn_of_clear_text(url)
        async with remote_operations(url, token) as remote:
            return await work(remote)
    load = functools.cache(_load if needs_tasks else _load_if_any)
    async with open_operations(settings, load, actor(), _tell_locked) as operations:
        return await work(operations)


def _warn_of_clear_text(url: str) -> None:
    """Warn on stderr that a token is sent over a network without encryption."""
    from urllib.parse import urlsplit

    from batch_system import console

    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "http" and host not in ("localhost", "::1") and not host.startswith("127."):
        console.warn(
            f"batch: the token is sent to {host} readably, because the URL begins with http: use "
            "https"
        )


def _tell_locked(holder: str) -> None:
    console.warn(f"waiting for the ledger's lock, held by {holder}")


def _load() -> Loaded:
    """Import the files in TASKS_DIR. Raises InvalidSetting."""
    from batch_system.batch.tasks.discovery import load_tasks
    from batch_system.batch.tasks.registry import TaskRegistry
    from batch_system.operations.asking.context import Loaded
    from batch_system.settings.reading import get_settings

    broken = load_tasks(get_settings().TASKS_DIR)
    return Loaded(TaskRegistry.tasks(), broken)


def _load_if_any() -> Loaded:
    """Import the files in TASKS_DIR; no tasks if there is no such folder."""
    from batch_system.operations.asking.context import Loaded

    with suppress(InvalidSetting):
        return _load()
    return Loaded()
