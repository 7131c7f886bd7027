"""`batch --version`. Alone, because `batch` imports what a command needs only when it runs."""

from __future__ import annotations

from pathlib import Path


def print_version() -> None:
    """Print the version of the package, and that of the application, as a service records it at its
    start.
    """
    from batch_system import console
    from batch_system.errors import BatchError
    from batch_system.settings.reading import get_settings
    from batch_system.versions import application_version, package_version

    console.say(f"batch {package_version()}")
    try:
        settings = get_settings()
    except BatchError:  # print the version even if a setting is wrong
        return
    version = application_version(settings.BATCH_VERSION, settings.TASKS_DIR, Path.cwd())
    console.say(f"application {version}")
