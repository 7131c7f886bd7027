"""Batch System: what authors of tasks import."""

from service.batch.base import BaseTask
from service.batch.context import CurrentRun, current_run
from service.batch.policies import Missed, Retry
from service.batch.registry import TaskRegistry
from service.batch.scheduler import create_scheduler, start_scheduler, stop_scheduler
from service.config import Settings, get_settings
from service.database import get_db
from service.errors import BatchError, DomainError
from service.logs import get_logger

__all__ = [
    "BaseTask",
    "BatchError",
    "CurrentRun",
    "DomainError",
    "Missed",
    "Retry",
    "Settings",
    "TaskRegistry",
    "create_scheduler",
    "current_run",
    "get_db",
    "get_logger",
    "get_settings",
    "start_scheduler",
    "stop_scheduler",
]
