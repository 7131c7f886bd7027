"""get_logger: what authors and the service log with."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger


def get_logger(name: str | None = None) -> BoundLogger:
    """A logger for `name` (give it `__name__`): `info("text", key=value)`, `error("text", exc_info=error)`."""
    return cast("BoundLogger", _Logger(name or sys._getframe(1).f_globals.get("__name__", "?")))


class _Logger:
    """Makes structlog's logger when it is first used: importing structlog takes as long as half of SQLAlchemy."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # copy and pickle look for methods of theirs
            raise AttributeError(attribute)
        return getattr(self._made, attribute)

    @cached_property
    def _made(self) -> BoundLogger:
        from service.logs.structured import make_logger

        return make_logger(self._name)
