"""`batch --version`."""

from __future__ import annotations


def print_version() -> None:
    """Print the version of the package, and that of the application if the setting BATCH_VERSION has it."""
    from service import console
    from service.batch.nodes.node import package_version
    from service.config import get_settings
    from service.errors import BatchError

    console.say(f"batch {package_version()}")
    try:
        version = get_settings().BATCH_VERSION
    except BatchError:  # a setting that is wrong is no reason not to say the version
        return
    if version is not None:
        console.say(f"application {version}")
