"""The settings of a nursery: where the tasks are, and how its children reach the application's
database.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.settings.settings import Settings

MOST_CONNECTIONS = 5
"""The most connections that a child opens to the server of the application's database."""


@dataclass(frozen=True)
class NurserySetup:
    """Plain values that can be sent to another process. They include passwords, so they never
    appear on a command line.

    Attributes:
      pool: The name of the pool.
      service: The process id of the service.
      forks: Whether the nursery forks a child for each run; otherwise it becomes the child of one
          run.
      tasks: The module and the class of each task of the service, by the name of the task.
      level: Lines below this level are dropped.
    """

    pool: str
    service: int
    forks: bool
    folder: str
    path: list[str]
    tasks_dir: str
    tasks: dict[str, tuple[str, str]]
    level: str
    lease_seconds: float
    has_lease: bool
    database: dict[str, Any]

    @classmethod
    def of(
        cls,
        pool: str,
        forks: bool,
        settings: Settings,
        tasks: Mapping[str, Task],
        node: str,
        has_lease: bool,
    ) -> Self:
        """The setup of a nursery for this process, with its present tasks."""
        database = {
            "url": settings.DATABASE_URL,
            "setting": "DATABASE_URL",
            "pool_size": min(settings.DATABASE_POOL_SIZE, MOST_CONNECTIONS),
            "client": f"batch/{node}",
            "shows_values": settings.BATCH_SHOW_SQL_PARAMETERS,
            "pooler": settings.BATCH_DATABASE_POOLER,
        }
        return cls(
            pool,
            os.getpid(),
            forks,
            str(Path.cwd()),
            list(sys.path),
            str(settings.TASKS_DIR),
            {name: (task.cls.__module__, task.cls.__qualname__) for name, task in tasks.items()},
            settings.LOG_LEVEL,
            settings.LEASE_SECONDS,
            has_lease,
            database,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**values)

    def open_database(self) -> Database:
        """The application's database. It opens no connection before it is used."""
        return Database(**self.database)
