"""The settings of pools: which processes execute the runs of a pool."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from batch_system.escaping import echoed

DEFAULT_POOL = "default"
"""The pool of a task that names none. Each service executes its runs on the event loop and in
threads.
"""
POOL_NAME = re.compile(r"[a-z0-9_]{1,40}")
POOL_NAME_ALLOWED = "1 to 40 of a-z 0-9 _"
PREFIX = "BATCH_POOL_"
MOST_PROCESSES = 1_000
DASK_PORT = 8786
ALLOWED = (
    f"process, process:N (N from 1 to {MOST_PROCESSES:,}), nodes, dask://HOST:PORT, "
    "dask+tls://HOST:PORT, "
    "or placer:MODULE:CLASS"
)
DASK_ALLOWED = (
    "dask://HOST:PORT or dask+tls://HOST:PORT, with ?resources=GPU%3D1 for what its workers must "
    "offer"
)

_KIND = re.compile(r"(?P<kind>process|nodes)(:(?P<number>[1-9][0-9]{0,3}))?", re.ASCII)
_PLACER = re.compile(r"placer:(?P<name>[\w.]+:\w+)")
_SCHEMES = {"dask": "tcp", "dask+tls": "tls"}
_RESOURCE = re.compile(r"(?P<name>[^=,\s]{1,100})=(?P<number>[0-9.eE+]{1,20})")


@dataclass(frozen=True)
class Pool:
    """What serves a pool.

    Attributes:
      kind: "process": each process of the service executes its runs in children; "nodes": only
          `batch work` does; "dask": the workers of a Dask cluster; "placer": an author's class
          places its tickets.
      processes: How many children at once on each node, for `kind` "process"; by default one for
          each core.
      address: That of the scheduler, for `kind` "dask".
      resources: The names and amounts of Dask's resources that a worker must offer for a run, for
          `kind` "dask".
      placer: "module:Class", for `kind` "placer".
    """

    kind: Literal["process", "nodes", "dask", "placer"]
    processes: int | None = None
    address: str | None = None
    resources: tuple[tuple[str, float], ...] = ()
    placer: str | None = None

    @property
    def is_placed(self) -> bool:
        """Whether services place tickets for its runs, and the nodes that execute them claim only
        on a ticket.
        """
        return self.kind in ("dask", "placer")

    def places_of(self, capacity: int) -> int:
        """How many runs of the pool a node executes at once, if it executes this many in all."""
        return (
            min(capacity, self.processes) if self.kind == "process" and self.processes else capacity
        )

    @property
    def words(self) -> str:
        """The setting in short."""
        if self.address is not None:
            return self.address.replace("tcp:", "dask:", 1).replace("tls:", "dask+tls:", 1)
        return (
            f"{self.kind}:{self.processes or self.placer}"
            if self.processes or self.placer
            else self.kind
        )


NO_POOLS: Mapping[str, Pool] = MappingProxyType({})


def pools_of(given: Mapping[str, object]) -> dict[str, Pool]:
    """The pools that the settings describe, by name. `given`: all settings by name, including those
    that are not fields.

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
        raise ValueError(
            f"setting {echoed(setting)}: after {PREFIX} comes the name of a pool, "
            f"{POOL_NAME_ALLOWED}"
        )
    if name == DEFAULT_POOL:
        raise ValueError(
            f"setting {setting}: the pool {DEFAULT_POOL!r} is the event loop and the threads of "
            "each service; "
            "give the task another pool"
        )
    return name


def _pool_of(setting: str, text: str) -> Pool:
    if "://" in text:
        return _dask(setting, text)
    if (placer := _PLACER.fullmatch(text)) is not None:
        return Pool("placer", placer=placer["name"])
    match = _KIND.fullmatch(text)
    number = int(match["number"]) if match and match["number"] else None
    if match is None or (match["kind"] == "nodes" and number) or (number or 1) > MOST_PROCESSES:
        raise ValueError(f"setting {setting} is {echoed(text)}; allowed: {ALLOWED}")
    return Pool("process" if match["kind"] == "process" else "nodes", number)


def _dask(setting: str, text: str) -> Pool:
    """Read an address. The text is not repeated in errors, because an address may contain a
    password.
    """
    problem = f"setting {setting} is an address that can't be used; allowed: {DASK_ALLOWED}"
    try:
        parts = urlsplit(text)
        port = parts.port or DASK_PORT
    except ValueError:
        raise ValueError(problem) from None
    if "@" in parts.netloc:
        raise ValueError(f"{problem}, without a user or a password: Dask has none")
    if (
        parts.scheme not in _SCHEMES
        or not parts.hostname
        or parts.path.strip("/")
        or parts.fragment
    ):
        raise ValueError(problem)
    query = parse_qsl(parts.query, keep_blank_values=True)
    if any(name != "resources" for name, _ in query):
        raise ValueError(problem)
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    named = [part for _, value in query for part in value.replace(",", " ").split()]
    resources = tuple(sorted(_resource(setting, part) for part in named))
    return Pool("dask", address=f"{_SCHEMES[parts.scheme]}://{host}:{port}", resources=resources)


def _resource(setting: str, text: str) -> tuple[str, float]:
    match = _RESOURCE.fullmatch(text)
    try:
        number = float(match["number"]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not 0 < number < math.inf:
        raise ValueError(
            f"setting {setting}: resources are NAME=NUMBER, as GPU=1, which is written GPU%3D1 "
            "there"
        )
    return match["name"], number
