"""Batch System: what authors of tasks import.

Each name is loaded when it is first asked for, so that `import batch_system` and `batch --help`
take no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` makes them names of this module, for type checkers
    from batch_system.batch.context.current_run import CurrentRun as CurrentRun
    from batch_system.batch.context.current_run import current_run as current_run
    from batch_system.batch.context.once import once as once
    from batch_system.batch.context.upstream import Done as Done
    from batch_system.batch.context.upstream import Upstream as Upstream
    from batch_system.batch.firing.limit_functions import limit_changed as limit_changed
    from batch_system.batch.queue.groups import Start as Start
    from batch_system.batch.queue.groups import start_all as start_all
    from batch_system.batch.queue.starts import run_of as run_of
    from batch_system.batch.queue.starts import start as start
    from batch_system.batch.queue.starts import start_sync as start_sync
    from batch_system.batch.tasks.after import After as After
    from batch_system.batch.tasks.base import BaseTask as BaseTask
    from batch_system.batch.tasks.calendars import Calendar as Calendar
    from batch_system.batch.tasks.calendars import Holidays as Holidays
    from batch_system.batch.tasks.declaration import Alerts as Alerts
    from batch_system.batch.tasks.declaration import Missed as Missed
    from batch_system.batch.tasks.declaration import Retry as Retry
    from batch_system.batch.tasks.item_task import ItemTask as ItemTask
    from batch_system.batch.tasks.item_task import Skip as Skip
    from batch_system.batch.tasks.limit import Limit as Limit
    from batch_system.batch.tasks.limit import Rate as Rate
    from batch_system.batch.tasks.partitioned_task import PartitionedTask as PartitionedTask
    from batch_system.batch.tasks.partitions import Part as Part
    from batch_system.batch.tasks.ranges import ranges as ranges
    from batch_system.batch.tasks.registry import TaskRegistry as TaskRegistry
    from batch_system.database.session import get_db as get_db
    from batch_system.database.sync import call_async as call_async
    from batch_system.database.sync import call_db as call_db
    from batch_system.errors import BatchError as BatchError
    from batch_system.errors import ChunkError as ChunkError
    from batch_system.errors import DomainError as DomainError
    from batch_system.errors import RetryAfter as RetryAfter
    from batch_system.logs import get_logger as get_logger
    from batch_system.server.by_hand import create_scheduler as create_scheduler
    from batch_system.server.by_hand import start_scheduler as start_scheduler
    from batch_system.server.by_hand import stop_scheduler as stop_scheduler
    from batch_system.settings.reading import Settings as Settings
    from batch_system.settings.reading import get_settings as get_settings

_HOMES = {
    "After": "batch.tasks.after",
    "Alerts": "batch.tasks.declaration",
    "BaseTask": "batch.tasks.base",
    "BatchError": "errors",
    "Calendar": "batch.tasks.calendars",
    "ChunkError": "errors",
    "CurrentRun": "batch.context.current_run",
    "DomainError": "errors",
    "Done": "batch.context.upstream",
    "Holidays": "batch.tasks.calendars",
    "ItemTask": "batch.tasks.item_task",
    "Limit": "batch.tasks.limit",
    "Rate": "batch.tasks.limit",
    "Missed": "batch.tasks.declaration",
    "Part": "batch.tasks.partitions",
    "PartitionedTask": "batch.tasks.partitioned_task",
    "Retry": "batch.tasks.declaration",
    "RetryAfter": "errors",
    "Settings": "settings.reading",
    "Skip": "batch.tasks.item_task",
    "Start": "batch.queue.groups",
    "TaskRegistry": "batch.tasks.registry",
    "Upstream": "batch.context.upstream",
    "call_async": "database.sync",
    "call_db": "database.sync",
    "create_scheduler": "server.by_hand",
    "current_run": "batch.context.current_run",
    "get_db": "database.session",
    "get_logger": "logs",
    "get_settings": "settings.reading",
    "limit_changed": "batch.firing.limit_functions",
    "once": "batch.context.once",
    "ranges": "batch.tasks.ranges",
    "run_of": "batch.queue.starts",
    "start": "batch.queue.starts",
    "start_all": "batch.queue.groups",
    "start_sync": "batch.queue.starts",
    "start_scheduler": "server.by_hand",
    "stop_scheduler": "server.by_hand",
}

__all__ = sorted(_HOMES)


if not TYPE_CHECKING:  # otherwise every name would be there for type checkers

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
