"""The library that packs and unpacks gzip members. Both the writer and the reader of a backup use
it; it is imported when a backup is made or read, because `batch-system-core` does not install it.
"""

from __future__ import annotations

from types import ModuleType

from batch_system.versions import missing


def igzip() -> ModuleType:
    """The module igzip_lib of isal. Raises BatchError if it is not installed."""
    try:
        from isal import igzip_lib
    except ModuleNotFoundError as error:
        raise missing("a backup", error) from None
    return igzip_lib
