"""Files of tasks that can't be used, and why."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from batch_system import escaping


@dataclass(frozen=True)
class BrokenFile:
    """A file whose import failed, or that has a class that can't be registered.

    Attributes:
      source: The path of the file.
      task: The name of the task that is missing because of it; None if it is not known, or
          another file has that task.
    """

    source: str
    error: str
    traceback: str
    task: str | None = None


MOST_BROKEN = 100
LONGEST_ERROR = 500


def broken_as_json(broken: Iterable[BrokenFile]) -> list[dict[str, Any]]:
    """Broken files as the ledger stores them: at most 100, without tracebacks, which are in the log
    of the process.
    """
    return [
        {
            "source": file.source,
            "error": escaping.brief(file.error, LONGEST_ERROR),
            "task": file.task,
        }
        for file in itertools.islice(broken, MOST_BROKEN)
    ]
