"""`batch status`, `batch doctor`, `batch nodes` and `batch pools`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batch_system.cli.hints import warn
from batch_system.cli.opening import FAILED, ask
from batch_system.cli.options import AsJson
from batch_system.settings.pools import DEFAULT_POOL
from batch_system.words import short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batch_system.operations.asking.results import Node, RunSummary
    from batch_system.operations.night.results import Status
    from batch_system.operations.system.results import PoolState
    from batch_system.verbs.following import Operations

MOST_FAILED = 10


def status(as_json: AsJson = False) -> None:
    """Say whether something is wrong with the service, and what.

    It says the same as `batch night`, and names the services and the newest backup. The exit code
    is 1 if something needs a person, otherwise it is 0.
    """
    from batch_system import console
    from batch_system.verbs.night import ShowStatus

    found = ask(lambda operations: operations(ShowStatus()), needs_tasks=False)
    if as_json:
        console.show_json(found)
    else:
        _show(found)
    raise SystemExit(0 if found.ok else FAILED)


def doctor(as_json: AsJson = False) -> None:
    """Look at each part that the service needs, and say what is wrong and what to do.

    `batch status` and `batch night` say what became of the runs; this looks at the databases, the
    disks, the processes, the backups and the channels. The exit code is 1 if something is bad.
    """
    from batch_system import console
    from batch_system.escaping import line
    from batch_system.verbs.system import Diagnose

    found = ask(lambda operations: operations(Diagnose()), needs_tasks=False)
    if as_json:
        console.show_json(found)
    else:
        colours = {"good": "success", "warning": "warning", "bad": "error"}
        for check in found.checks:
            word = console.paint(f"{check.health:<7}", colours[check.health])
            console.write(f"{word}  {line(check.part)}: {line(check.text)}")
            if check.do is not None:
                console.write(f"         {line(check.do)}")
    raise SystemExit(0 if found.ok else FAILED)


def _show(found: Status) -> None:
    from batch_system import console
    from batch_system.escaping import line

    console.show_values(
        {
            "services": [_named(node) for node in found.nodes if node.fires] or "none",
            "workers": [
                f"{_named(node)}, of {_of_pools(node)}" for node in found.nodes if not node.fires
            ],
            "pools": [_pool_in_words(pool) for pool in found.pools if pool.name != DEFAULT_POOL],
            "last beat": found.last_beat,
            "running": f"{found.running:,}",
            "queued": f"{found.queued:,}",
            "failed": f"{found.failed:,}",
            "quarantine": f"{found.quarantined:,}",
            "newest backup": found.newest_backup or "none",
        }
    )
    _show_failed(found.failed_runs, found.failed)
    console.say()
    if found.sentence:
        console.write(line(found.sentence))
    for trouble in found.troubles:
        console.write(f"{console.paint('problem', 'error')}: {line(trouble.text)}")
    told = [trouble.text for trouble in found.troubles]
    for problem in (pool.problem for pool in found.pools if pool.problem):
        if not any(problem.split(":")[0] in text for text in told):
            console.write(f"{console.paint('warning', 'warning')}: {line(problem)}")
    if found.ok:
        console.write(line(found.headline))


def _show_failed(failed: Sequence[RunSummary], number: int) -> None:
    from batch_system import console

    if not failed:
        return
    console.heading("Failed runs, the newest first")
    rows = [{**run.model_dump(), "id": short(run.id)} for run in failed[:MOST_FAILED]]
    console.show_fitted(
        rows, ["id", "task", "slot", "finished_at", "reason"], ["slot", "finished_at"]
    )
    if number > MOST_FAILED:
        console.say(f"and {number - MOST_FAILED:,} more: `batch runs --state failed` lists them")


def _named(node: Node) -> str:
    return f"process {node.pid} on {node.host}" + (", which stops" if node.draining else "")


def _of_pools(node: Node) -> str:
    return f"pool{'' if len(node.pools) == 1 else 's'} {', '.join(node.pools)}"


def _pool_in_words(pool: PoolState) -> str:
    nodes = f"{len(pool.nodes):,} node{'' if len(pool.nodes) == 1 else 's'}"
    return f"{pool.name}: {nodes}, {pool.running:,} running, {pool.waiting:,} waiting"


def pools(as_json: AsJson = False) -> None:
    """List the pools: what serves each of them, and how many of its runs are running and waiting.

    `served by` is what the settings here say: a setting such as BATCH_POOL_CPU. Why the runs of a
    pool wait in vain is said on stderr. The exit code is 0.
    """
    from batch_system import console
    from batch_system.verbs.system import ListPools

    found = ask(lambda operations: operations(ListPools()), needs_tasks=False).pools
    if as_json:
        console.show_json(found)
        return
    rows = [
        {
            "pool": pool.name,
            "served by": pool.served_by or "no setting",
            "nodes": f"{len(pool.nodes):,}",
            "places": f"{pool.places:,}" if pool.places is not None else None,
            "running": f"{pool.running:,}",
            "waiting": f"{pool.waiting:,}",
            "tasks": f"{len(pool.tasks):,}",
        }
        for pool in found
    ]
    console.show(rows, list(rows[0]), as_json=False)
    for pool in found:
        warn(pool.problem)


def nodes(as_json: AsJson = False) -> None:
    """List the processes of the service, newest first, also those that have stopped.

    `state` is running, draining (it stops, and its runs have time to end), stopped, silent (it did
    not stop, but it has shown no sign of life within LEASE_SECONDS, or its process is gone), or
    lost (other nodes have found it gone). What is wrong with those that live, as their `/readyz`
    says it, is said on stderr before the table.
    """
    from batch_system import console
    from batch_system.verbs.system import ListNodes

    async def work(operations: Operations) -> tuple[list[Node], list[Node]]:
        known = await operations(ListNodes())
        return known.nodes, (await operations(ListNodes(living=True))).nodes

    known, living = ask(work, needs_tasks=False)
    if as_json:
        console.show_json(known)
        return
    if not known:
        console.warn("batch: no service has ever run")
        return
    from batch_system.operations.system.nodes import troubles_of

    for named, reasons in troubles_of(living):
        warn(f"{named}: {reasons}")
    alive = {node.id for node in living}
    rows = [_row(node, is_alive=node.id in alive) for node in known if node.fires or node.pools]
    columns = ["id", "host", "pid", "version", "state", "pools", "started_at", "seen_at", "tasks"]
    console.show_fitted(rows, columns, ["version", "id", "started_at", "tasks"])


def _row(node: Node, *, is_alive: bool) -> dict[str, Any]:
    pools = ", ".join(node.pools) if node.pools != [DEFAULT_POOL] else None
    more = {
        "id": short(node.id),
        "pools": pools,
        "state": node.state(is_alive),
        "tasks": f"{len(node.tasks):,}",
    }
    return {**node.model_dump(), **more}
