"""get_logger(): loggers for authors and for the service. Alone, because it is imported without
structlog.
"""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from structlog.stdlib import BoundLogger


def get_logger(name: str | None = None) -> BoundLogger:
    """A logger named `name`, by default after the calling module: `info("text", key=value,
    exc_info=error)`.
    """
    return cast("BoundLogger", _Logger(name or sys._getframe(1).f_globals.get("__name__", "?")))


class _Logger:
    """Makes the structlog logger on first use, because importing structlog takes half as long as
    SQLAlchemy.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # copy and pickle look for special methods
            raise AttributeError(attribute)
        return getattr(self._logger, attribute)

    @cached_property
    def _logger(self) -> BoundLogger:
        from batch_system.logs.structured import make_logger

        return make_logger(self._name)
