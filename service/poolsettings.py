"""The settings of pools: which processes execute the runs of a pool."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from service.escaping import echoed

DEFAULT_POOL = "default"
"""The pool of a task that names none. Each service executes its runs on the event loop and in threads."""
POOL_NAME = re.compile(r"[a-z0-9_]{1,40}")
POOL_NAME_ALLOWED = "1 to 40 of a-z 0-9 _"
PREFIX = "BATCH_POOL_"
MOST_PROCESSES = 1_000
ALLOWED = f"process, process:N (N from 1 to {MOST_PROCESSES:,}), or nodes"

_KIND = re.compile(r"(?P<kind>process|nodes)(:(?P<number>[1-9][0-9]{0,3}))?", re.ASCII)


@dataclass(frozen=True)
class Pool:
    """What serves a pool.

    Attributes:
        kind: "process": each process of the service executes its runs in children; "nodes": only `batch work` does.
        processes: How many children at once on each node, for `kind` "process"; None: one for each core.
    """

    kind: Literal["process", "nodes"]
    processes: int | None = None


def pools_of(given: Mapping[str, object]) -> dict[str, Pool]:
    """The pools that the settings describe, by name. `given`: all settings by name, also those of no field.

    Raises ValueError, which names the setting and what is allowed.
    """
    return {
        _name_of(setting): _pool_of(setting, str(value).strip())
        for setting, value in sorted(given.items())
        if setting.startswith(PREFIX) and str(value).strip()
    }


def _name_of(setting: str) -> str:
    name = setting.removeprefix(PREFIX).lower()
    if not POOL_NAME.fullmatch(name):
        raise ValueError(f"setting {echoed(setting)}: after {PREFIX} comes the name of a pool, {POOL_NAME_ALLOWED}")
    if name == DEFAULT_POOL:
        raise ValueError(
            f"setting {setting}: the pool {DEFAULT_POOL!r} is the event loop and the threads of each service; "
            "give the task another pool"
        )
    return name


def _pool_of(setting: str, text: str) -> Pool:
    match = _KIND.fullmatch(text)
    number = int(match["number"]) if match and match["number"] else None
    if match is None or (match["kind"] == "nodes" and number) or (number or 1) > MOST_PROCESSES:
        raise ValueError(f"setting {setting} is {echoed(text)}; allowed: {ALLOWED}")
    return Pool("process" if match["kind"] == "process" else "nodes", number)
