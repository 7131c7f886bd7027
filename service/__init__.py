"""Batch System: what authors of tasks import.

Each name is loaded when it is first asked for, so that `import service` and `batch --help` take no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` makes them names of this module, for type checkers
    from service.batch.base import BaseTask as BaseTask
    from service.batch.chunking.items import ItemTask as ItemTask
    from service.batch.chunking.items import Skip as Skip
    from service.batch.context import CurrentRun as CurrentRun
    from service.batch.context import current_run as current_run
    from service.batch.once import once as once
    from service.batch.policies import Missed as Missed
    from service.batch.policies import Retry as Retry
    from service.batch.registry import TaskRegistry as TaskRegistry
    from service.batch.scheduler import create_scheduler as create_scheduler
    from service.batch.scheduler import start_scheduler as start_scheduler
    from service.batch.scheduler import stop_scheduler as stop_scheduler
    from service.batch.starting import start as start
    from service.config import Settings as Settings
    from service.config import get_settings as get_settings
    from service.database.session import get_db as get_db
    from service.database.sync import call_async as call_async
    from service.database.sync import call_db as call_db
    from service.errors import BatchError as BatchError
    from service.errors import ChunkError as ChunkError
    from service.errors import DomainError as DomainError
    from service.errors import RetryAfter as RetryAfter
    from service.logs import get_logger as get_logger

_HOMES = {
    "BaseTask": "batch.base",
    "BatchError": "errors",
    "ChunkError": "errors",
    "CurrentRun": "batch.context",
    "DomainError": "errors",
    "ItemTask": "batch.chunking.items",
    "Missed": "batch.policies",
    "Retry": "batch.policies",
    "RetryAfter": "errors",
    "Settings": "config",
    "Skip": "batch.chunking.items",
    "TaskRegistry": "batch.registry",
    "call_async": "database.sync",
    "call_db": "database.sync",
    "create_scheduler": "batch.scheduler",
    "current_run": "batch.context",
    "get_db": "database.session",
    "get_logger": "logs",
    "get_settings": "config",
    "once": "batch.once",
    "start": "batch.starting",
    "start_scheduler": "batch.scheduler",
    "stop_scheduler": "batch.scheduler",
}

__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # or else every name would be there for type checkers

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
