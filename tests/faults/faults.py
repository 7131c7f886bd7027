"""The faults, one function each, and plans of them."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from collections.abc import Callable

from sqlalchemy.exc import DBAPIError

from batch_system.errors import DatabaseError
from tests.faults.nodes import Nodes, come_to_rest
from tests.faults.observer import observer
from tests.faults.world import LEASE, NUMBER, WITH_CHILDREN, World

Fault = Callable[[World, Nodes], str]
"""Does it, and says to whom. Returns before it is over where others may happen meanwhile."""
AWAY = (DBAPIError, DatabaseError, OSError)
AWAITING = (
    "SELECT w.run AS id FROM batch_waits w JOIN batch_runs a ON a.task = w.task "
    "AND a.slot = w.slot "
    "WHERE CAST(a.id AS text) = :id AND a.origin <> 'manual' "
    "UNION SELECT awaited_by FROM batch_runs WHERE CAST(id AS text) = :id "
    "AND awaited_by IS NOT NULL"
)

OVER = (
    "SELECT id, state FROM batch_runs r WHERE finished_at IS NOT NULL AND (origin <> 'part' "
    "OR (SELECT p.state FROM batch_runs p WHERE p.id = r.awaited_by) = 'waiting') "
    "ORDER BY id DESC LIMIT 60"
)
"""The last runs that a person may have go on: parts only as long as their run waits for others."""


def kill(world: World, nodes: Nodes) -> str:
    place = nodes.victim()
    told = nodes.name(place)
    nodes.kill(place)
    nodes.start(place)
    return told


def kill_child(world: World, nodes: Nodes) -> str:
    """A child of the worker that has children, or the nursery that forks them."""
    return nodes.kill_below(WITH_CHILDREN)


def terminate(world: World, nodes: Nodes) -> str:
    """The next one begins while it drains."""
    place = nodes.victim()
    told = nodes.name(place)
    nodes.terminate(place)
    nodes.start(place)
    return told


def terminate_and_kill(world: World, nodes: Nodes) -> str:
    """The drain is cut short."""
    place = nodes.victim()
    told = nodes.name(place)
    ending = nodes.terminate(place)
    nodes.pass_time(world.random.uniform(0.0, 1.5))
    ending.process.kill()
    nodes.start(place)
    return told


def freeze(world: World, nodes: Nodes) -> str:
    """SIGSTOP, mostly for longer than a lease; then it wakes and finds its runs taken. By others,
    if they are awake.
    """
    nodes.until_all_are_well()
    place = nodes.victim()
    seconds = LEASE * world.random.uniform(0.8, 2.4)
    nodes.freeze(place, seconds)
    return f"{nodes.name(place)} for {seconds:.1f} s"


def freeze_and_kill(world: World, nodes: Nodes) -> str:
    place = nodes.victim()
    told = nodes.name(place)
    nodes.freeze(place, 60)
    nodes.pass_time(LEASE * world.random.uniform(0.2, 1.5))
    nodes.kill(place)
    nodes.start(place)
    return told


def clock(world: World, nodes: Nodes) -> str:
    """The wall clock of a service that lives steps. On SQLite that is the machine's, so it is that
    of all.
    """
    place = nodes.victim()
    if world.server is not None:
        world.clocks[place].set(world.random.uniform(-600, 600))
        return f"{nodes.name(place)} is {world.clocks[place].seconds:+.0f} s wrong"
    step = world.random.choice([world.random.uniform(-6, -1), world.random.uniform(5, 200)])
    world.clocks[0].set(world.clocks[0].seconds + step)
    return f"of all by {step:+.0f} s"


def cancel(world: World, nodes: Nodes) -> str:
    with contextlib.suppress(*AWAY):
        if active := world.active():
            return world.begin("cancel", str(world.random.choice(active)["id"]), "--wait", "0")
    return "nothing"


def retry(world: World, nodes: Nodes) -> str:
    """A run that is over, whatever way, from the beginning or not; now and then with what comes
    after it.
    """
    with contextlib.suppress(*AWAY):
        over = world.query(OVER)
        if over:
            run = world.random.choice(over)
            words = ["--again"] if run["state"] == "succeeded" else []
            after = (
                _comes_after(world, str(run["id"])) if words and world.random.random() < 0.5 else []
            )
            words += ["--and-after", "--yes"] if after else []
            world.reopened.update([str(run["id"]), *after])
            return world.begin("retry", str(run["id"]), *words)
    return "nothing"


def _comes_after(world: World, run: str) -> list[str]:
    """The runs that have waited for a run, and those that have waited for these."""
    found: list[str] = []
    asked = [run]
    while asked:
        new = {str(row["id"]) for id in asked for row in world.query(AWAITING, id=id)} - {
            run,
            *found,
        }
        asked = sorted(new)
        found += asked
    return found


def backfill(world: World, nodes: Nodes) -> str:
    """The last slots, also where they have run: those go again."""
    task = world.random.choice(["tick", "sync", "flaky", "many"])
    with contextlib.suppress(*AWAY):
        runs = world.query(
            "SELECT id, slot FROM batch_runs WHERE task = :task ORDER BY slot DESC LIMIT 8",
            task=task,
        )
        if len(runs) > 4:
            for run in runs:
                world.reopened[str(run["id"])] += 1
            slots = [str(run["slot"]).replace(" ", "T") for run in runs]
            since, until = (
                slot if "+" in slot else f"{slot}+00:00" for slot in (slots[-1], slots[3])
            )
            return world.begin("backfill", task, "--from", since, "--to", until, "--again")
    return "nothing"


def crash(world: World, nodes: Nodes) -> str:
    """PostgreSQL."""
    return _server(world, nodes, "immediate")


def restart(world: World, nodes: Nodes) -> str:
    """PostgreSQL."""
    return _server(world, nodes, "fast")


def _server(world: World, nodes: Nodes, mode: str) -> str:
    assert world.server is not None
    seconds = LEASE * world.random.choice([0.0, world.random.uniform(0.1, 1.5)])
    world.server.stop(mode)
    nodes.pass_time(seconds)
    world.server.start()
    return f"for {seconds:.1f} s"


def cut(world: World, nodes: Nodes) -> str:
    """Some connections, or all."""
    share = world.random.choice([0.3, 1.0])
    door: int | str = nodes.victim()
    return _network(world, world.random.choice(["all", door]), "cut", share)


def isolate(world: World, nodes: Nodes) -> str:
    """One service loses its database, and nobody else; all of them now and then."""
    nodes.until_all_are_well()
    return _network(world, _few(world, nodes), "refuse", LEASE * world.random.uniform(0.3, 3.0))


def hold(world: World, nodes: Nodes) -> str:
    """Nothing comes through, and nothing is closed."""
    nodes.until_all_are_well()
    return _network(world, _few(world, nodes), "hold", LEASE * world.random.uniform(0.3, 2.0))


def lose_replies(world: World, nodes: Nodes) -> str:
    """COMMITs are done, but their replies are lost."""
    share = world.random.choice([0.2, 0.7, 1.0])
    return _network(
        world, _few(world, nodes, one=0.5), "lose", LEASE * world.random.uniform(0.5, 1.5), share
    )


def drop_commits(world: World, nodes: Nodes) -> str:
    """COMMITs do not even arrive."""
    return _network(
        world, _few(world, nodes, one=0.5), "drop", LEASE * world.random.uniform(0.2, 1.0), 0.5
    )


def _few(world: World, nodes: Nodes, one: float = 0.8) -> int | str:
    return nodes.victim() if world.random.random() < one else "all"


def _network(world: World, door: int | str, command: str, *values: float) -> str:
    assert world.network is not None
    for place in range(NUMBER) if door == "all" else [door]:
        world.blame(f"place {place}", values[0] if command != "cut" else 0, after=LEASE / 2)
    if command != "cut":
        world.network_is_well_at = max(world.network_is_well_at, time.monotonic() + values[0])
    world.network.tell(door, command, *values)
    return f"{door} {' '.join(f'{value:.1f}' for value in values)}"


def lock_ledger(world: World, nodes: Nodes) -> str:
    return _lock(world, nodes, "ledger.db")


def lock_application(world: World, nodes: Nodes) -> str:
    return _lock(world, nodes, "app.db")


def _lock(world: World, nodes: Nodes, name: str) -> str:
    """Another process of this machine holds SQLite's write lock. With that of the ledger nobody can
    renew a lease.
    """
    seconds = LEASE * world.random.uniform(0.2, 1.5)
    other = sqlite3.connect(world.folder / name, timeout=0.05, isolation_level=None)
    with contextlib.closing(other):
        give_up_at = time.monotonic() + 10
        while not _is_locked_by(other):  # what holds it may be frozen
            if time.monotonic() > give_up_at:
                return "in vain"
            nodes.pass_time(0.02)
        for place in range(NUMBER) if name == "ledger.db" else ():
            world.blame(f"place {place}", seconds, after=LEASE / 2)
        nodes.pass_time(seconds)
        other.execute("ROLLBACK")
    return f"for {seconds:.1f} s"


def _is_locked_by(other: sqlite3.Connection) -> bool:
    try:
        other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True


ANYWHERE: dict[Fault, int] = {
    kill: 3,
    kill_child: 3,
    terminate: 2,
    terminate_and_kill: 1,
    freeze: 7,
    freeze_and_kill: 1,
    clock: 2,
    cancel: 1,
    retry: 1,
    backfill: 1,
}
FAULTS: dict[str, dict[Fault, int]] = {
    "sqlite": {**ANYWHERE, lock_ledger: 3, lock_application: 3},
    "postgresql": {
        **ANYWHERE,
        crash: 1,
        restart: 1,
        cut: 2,
        isolate: 3,
        hold: 2,
        lose_replies: 3,
        drop_commits: 1,
    },
}


def plan(kind: str, seed: int, count: int, only: str = "") -> list[Fault]:
    """So many faults for databases of this kind; `only`: the names of those that are wanted, with
    commas.
    """
    weights = {
        fault: n
        for fault, n in FAULTS[kind].items()
        if not only or fault.__name__ in only.split(",")
    }
    return random.Random(seed).choices(list(weights), list(weights.values()), k=count)


def disturb(world: World, faults: list[Fault]) -> None:
    """Do these faults to some services, and then let one come to rest."""
    with observer(world.ledger, world.finals):
        nodes = Nodes(world)
        nodes.until_they_serve()
        nodes.pass_time(LEASE)
        for number, fault in enumerate(faults):
            # The same one whatever the last ones asked for.
            world.random = random.Random(f"{world.seed}/{number}")
            world.counts[fault.__name__] += 1
            world.say(f"{number + 1}. {fault.__name__}")
            world.say(f"   {fault(world, nodes)}")
            nodes.pass_time(world.random.uniform(0.2, 1.6))
        nodes.pass_time(LEASE)
        world.say("the end")
        nodes.end()
        come_to_rest(world)
    world.end_commands()
    if world.network is not None:
        world.counts.update(
            {f"connections: {k}": v for k, v in world.network.tell("all", "count").items()}
        )
