"""What is answered about the system: pools, settings and migrations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from batch_system.operations.asking.results import Node, Result


class PoolState(Result):
    """A pool: where runs of its tasks execute.

    Attributes:
        served_by: What serves it by the settings of the process that answers: "services" for the
            default pool, "process", "process:N", "nodes", "dask://…" or "placer:…"; None: there is
            no setting.
        nodes: The ids of the living nodes that claim its runs, without those that stop.
        places: How many runs these execute at once, together; None: not known. One that claims
            several pools counts in each.
        running: Runs that are going on.
        waiting: Runs that may start now, of each task counted up to 1,000.
        tasks: The names of its tasks.
        missing: Those of its tasks that none of its nodes has loaded.
        problem: Why its runs wait in vain, or would, and what to do; None: they don't.
    """

    name: str
    served_by: str | None
    nodes: list[str]
    places: int | None
    running: int
    waiting: int
    tasks: list[str]
    missing: list[str]
    problem: str | None


class UsedSetting(Result):
    """A setting. `value`: a secret is `***`, and a URL is without its password and its query; None
    if it is empty.

    `source`: default, environment, or `.env`.
    """

    name: str
    value: str | int | float | bool | None
    source: str


class UsedSettings(Result):
    """All settings. `others`: the names of further keys in `.env`, which may be an author's own, or
    mistyped.
    """

    settings: list[UsedSetting]
    others: list[str]


class Migration(Result):
    """The state of one history of migrations. `current`: the revision of the database; None if it
    has no tables yet.

    `newest`: the last revision that this code knows. `is_due`: a migration would change the
    database. `expands`: it is due, and all code that may use the tables now may go on.
    `oldest_version`: the version that has set which code may use them; None: it is from before any
    did. `in_the_way`: the living processes that have to stop before the ledger is migrated.
    """

    database: Literal["application", "ledger"]
    version_table: str
    current: str | None
    newest: str
    is_due: bool
    expands: bool = False
    oldest_version: str | None = None
    in_the_way: Sequence[str] = ()


class NodeList(Result):
    """The processes of the service, also those that have stopped lately, the newest first."""

    nodes: list[Node]


class PoolList(Result):
    """The pools of all tasks, nodes and settings, the default one first."""

    pools: list[PoolState]
