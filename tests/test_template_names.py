"""The names that the template's documents import: a clone passes them on from `service`."""

from __future__ import annotations

from importlib import import_module

import pytest

import batch_system
import service

NAMES = {
    "service.app": ("app", "create_app", "lifespan"),
    "service.batch": (
        "BaseTask",
        "TaskRegistry",
        "create_scheduler",
        "start_scheduler",
        "stop_scheduler",
    ),
    "service.batch.base": ("BaseTask",),
    "service.batch.registry": ("TaskRegistry",),
    "service.batch.scheduler": ("create_scheduler", "start_scheduler", "stop_scheduler"),
    "service": ("DomainError", "get_db", "get_logger", "get_settings"),
    "service.application.models": ("User", "Session"),
    "service.application.sessions": ("SessionService",),
    "tasks.backup": ("BackupTask",),
    "tasks.cleanup_sessions": ("CleanupSessionsTask",),
    "tasks.daily_report": ("DailyReportTask",),
    "batch_system.backup": ("create_backup",),
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in NAMES.items() for name in names]
)
def test_each_name_of_the_template_is_where_the_page_says(module: str, name: str) -> None:
    found = getattr(import_module(module), name)
    if name in batch_system.__all__:
        assert found is getattr(batch_system, name)


def test_service_passes_on_what_batch_system_names_and_nothing_else() -> None:
    assert all(
        getattr(service, name) is getattr(batch_system, name) for name in batch_system.__all__
    )
    with pytest.raises(AttributeError, match="module 'service' has no attribute 'Nothing'"):
        _ = service.Nothing
