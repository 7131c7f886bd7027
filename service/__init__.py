"""The service of this clone: its application, models and migrations. The library is batch_system.

All names of batch_system can also be imported from here, as the template documents them.
"""

from typing import TYPE_CHECKING, Any

import batch_system

if TYPE_CHECKING:
    from batch_system import *  # noqa: F403

__all__ = batch_system.__all__


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(batch_system, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
