"""Chunks on PostgreSQL whose connection is cut around their commits, and whose process stands still
before one.

CHUNK_KILLS=100 is the long form of the first, see test_chunks.py. About 20 s.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import make_url

from batch_system.testing.postgres import PostgresServer
from tests.batch.test_chunk_processes import ITEMS, KILLS, SEED, SIZE, World, world
from tests.faults.network import Proxy, proxy_before
from tests.processes import SERVE, Service, is_stopped, process, service

__all__ = ["world"]

SHORT = ("lose", "lose", "drop", "kill", "drop", "cut")
"""With the run's first fence a chunk that fails ends the attempt, with its second it is handed out
again, and so on.
"""

on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def network(postgres_server: PostgresServer) -> Iterator[Proxy]:
    with proxy_before(postgres_server, 1) as made:
        yield made


def put_between(world: World, network: Proxy) -> None:
    """Chunks go through the proxy, the ledger does not. The test looks past it, too."""
    database = make_url(world.url).database
    world.settings["DATABASE_URL"] = (
        f"postgresql+asyncpg://postgres@127.0.0.1:{network.ports[0]}/{database}?ssl=disable"
    )


def take_commits(network: Proxy, what: str, running: Service) -> None:
    """The next COMMIT: the one after it comes 50 ms later."""
    before = network.tell(0, what, 60, 1.0)[what]
    until(lambda: network.tell("all", "count")[what] > before, running, each=0.002)
    network.tell(0, what, 0, 0)


def disturb(network: Proxy, running: Service, fault: str, chance: random.Random) -> None:
    time.sleep(chance.uniform(0, 0.05))
    if fault == "kill":
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
    elif fault == "cut":
        network.tell(0, "cut", 1.0)
    else:
        take_commits(network, fault, running)


@on_postgresql
def test_cut_off_before_in_and_after_its_commits_each_item_is_done_exactly_once(
    world: World, network: Proxy
) -> None:
    chance, began_at, said = random.Random(SEED), time.monotonic(), ""
    faults = list(SHORT) if len(SHORT) >= KILLS else chance.choices(SHORT, k=KILLS)
    put_between(world, network)
    with ExitStack() as stack:
        running = stack.enter_context(service(world.folder, settings=world.settings))
        world.start("--param", "pause=0.02")
        for fault in faults:
            world.until_seen(world.seen, running)
            disturb(network, running, fault, chance)
            if fault == "kill":
                said += running.stderr
                running = stack.enter_context(process(world.folder, SERVE, world.settings))
        assert world.seen < ITEMS
        _, attempt, fence = world.until_over(running)
        said += running.stderr
    world.assert_exactly_once()
    assert "follows in" in said and "is tried again" in said
    told = ("follows in", "is tried again", "resumes after", "already committed")
    seconds = time.monotonic() - began_at
    print(
        f"seed {SEED}: {len(faults)} faults, {ITEMS // SIZE} chunks, {seconds:.0f} s; attempt "
        f"{attempt}, fence {fence}"
    )
    print(
        dict(Counter(faults)),
        network.tell("all", "count"),
        {words: said.count(words) for words in told},
    )


@on_postgresql
def test_frozen_before_its_commit_it_is_refused_when_it_wakes_up(world: World) -> None:
    """Its own lease is long: it does not know that the lease has ended, so the database has to
    refuse it.
    """
    calm = dict(world.settings)
    world.settings |= {"HEARTBEAT_SECONDS": "20", "LEASE_SECONDS": "60"}
    with world.striking("before", 20, "SIGSTOP") as frozen:
        frozen.wait_until_ready()
        world.start()
        until(lambda: is_stopped(frozen.process.pid), frozen)
        assert world.seen == 19 * SIZE
        with service(
            world.folder, settings={**calm, "HEARTBEAT_SECONDS": "0.3", "LEASE_SECONDS": "2"}
        ) as other:
            world.until_seen(world.seen, other)
            frozen.process.send_signal(signal.SIGCONT)
            assert world.until_over(other)[0] == "succeeded"
            assert "resumes after chunk 19" in other.stderr
            until(lambda: "its outcome here is not recorded" in frozen.stderr, frozen)
    # Its COMMIT: the one that took over has ended its connections.
    assert "work failed: DBAPIError" in frozen.stderr
    outcomes = world.query("SELECT fence, outcome FROM batch_attempts ORDER BY fence", ledger=True)
    # On a busy machine the other node may lose its lease of two seconds as well, and go on.
    assert outcomes[0] == (1, "lost")
    assert [fence for fence, outcome in outcomes if outcome == "succeeded"] == [len(outcomes)]
    world.assert_exactly_once()


def until(condition: Callable[[], bool], running: Service, each: float = 0.02) -> None:
    give_up_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up_at, running.stderr[-2000:]
        time.sleep(each)
