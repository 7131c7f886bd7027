"""The result of a run: whether it is what the task expects, and its JSON for the ledger."""

from __future__ import annotations

import json
from typing import Any

from pydantic_core import to_json

from batch_system import escaping, failures
from batch_system.batch.tasks.declaration import expect_of
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.logs import get_logger, log_lines

logger = get_logger("batch_system.batch")

LARGEST_RESULT = 1_000_000
"""The largest size of a result as JSON, in bytes."""
LONGEST_BEGINNING = 1_000
"""How many characters of a larger result are kept."""
LONGEST_DESCRIPTION = 10_000
"""How many characters are kept of the repr of a result that is not JSON."""

_TEXTS, _CONTAINERS = (str, bytes), (dict, list, tuple, set, frozenset)

UNMET = "it has succeeded, but its result is not what the task expects"


async def unmet(task: Task, result: Any, threads: ThreadPool, patience: float) -> str | None:
    """Why the result of a run is not what the task expects; None if it is. `expect` is called where
    `run` was called: on the event loop or in a thread.

    `patience`: how many seconds a cancelled thread may take to end.
    """
    expect = expect_of(task.cls) if task.monitoring.expects else None
    if expect is None:
        return None
    try:
        if task.on_loop:
            is_met = bool(expect(result))
        else:
            is_met = await threads.run(lambda: bool(expect(result)), patience=patience)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        # An author's function may raise anything.
        return f"{UNMET}: `expect` raised {failures.line_of(error)}"
    return None if is_met else UNMET


def as_json(result: Any) -> Any:
    """The result as JSON values. A result that can't be stored is described in a text instead,
    because the run has succeeded.
    """
    if result is None:
        return None
    try:
        if _is_large(result):
            return _beginning(json.dumps(log_lines.plain(result), ensure_ascii=False))
        encoded = to_json(result, inf_nan_mode="strings", fallback=repr)
        return (
            json.loads(encoded)
            if len(encoded) <= LARGEST_RESULT
            else _beginning(encoded.decode(errors="replace"))
        )
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an author's object may raise anything
        type_name, text = type(result).__name__, escaping.echoed(result, LONGEST_DESCRIPTION)
        return (
            f"a result of type {type_name} that can't be kept as JSON ({failures.line_of(error)}): "
            f"{text}"
        )


def _is_large(result: Any) -> bool:
    """Whether the texts and containers in the result are too large to encode. Works without
    recursion.
    """
    bytes_left, unread = LARGEST_RESULT, [result]
    while unread:
        value = unread.pop()
        if isinstance(value, _TEXTS):
            bytes_left -= len(value)
        elif isinstance(value, _CONTAINERS):
            bytes_left -= 2 * len(value)
            if bytes_left >= 0:
                unread += value.values() if isinstance(value, dict) else value
        if bytes_left < 0:
            return True
    return False


def _beginning(encoded: str) -> str:
    logger.warning(f"the result has more than {LARGEST_RESULT:,} bytes; only its beginning is kept")
    return f"{encoded[:LONGEST_BEGINNING]}…"
