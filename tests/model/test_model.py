"""The ledger's functions beside a model in plain Python, in random order, by two nodes and a
person.

MODEL_EXAMPLES makes a long form of it, of so many random examples: `MODEL_EXAMPLES=5000 pytest -s
tests/model`. Its examples are others each time, so it only prints what none of them has made
happen.
"""

from __future__ import annotations

import faulthandler
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from batch_system.batch.firing import misfires
from batch_system.batch.ledger.states import TRANSITIONS
from batch_system.batch.queue import unserved
from batch_system.testing.postgres import PostgresServer
from tests.conftest import KINDS
from tests.model.beside import Beside, PartsBeside
from tests.model.machine import Machine, change
from tests.model.nodes import Nodes
from tests.model.partitions import Everything, Partitions
from tests.model.people import People
from tests.model.watchers import Watchers
from tests.model.world import World

LONG = int(os.environ.get("MODEL_EXAMPLES", "0"))

SETTINGS = settings(
    max_examples=LONG or 7,
    stateful_step_count=40,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)

SEEDS = (5, 3, 0, 1, 2, 4, 6, 7)
"""Of the rounds of so many examples each: two, and more until all has happened that has to; one of
partitioned runs.

With the code as it is, the first ones make all of it happen on both databases. Others may come
first when it changes.
"""

SELDOM = {
    *(("succeeded", "queued"), ("skipped", "queued"), ("cancelled", "queued")),
    *(
        ("interrupted", "cancelled"),
        ("interrupted", "failed"),
        ("retrying", "failed"),
        ("cancelled", "waiting"),
        ("failed", "waiting"),
    ),
}
"""Changes of a state that a few rounds need not have; tests/batch/test_transitions.py makes each of
TRANSITIONS.
"""

OF_PARTS = (
    *(
        "split",
        "parts are over",
        "joins",
        "failed with its parts",
        "failed fast",
        "cancelled with its parts",
    ),
    *("runs its bad parts again", "split anew", "part again"),
    *(change("running", "waiting"), change("waiting", "failed")),
)
"""What happens only to partitioned runs. They have a round of their own; the long form has them
among all others.
"""

HAPPENS = (
    *(
        "started when fired",
        "caught up",
        "missed",
        "skipped by skip",
        "skipped by wait",
        "replaced",
    ),
    *(
        "claimed queued",
        "claimed retrying",
        "claimed interrupted",
        "claimed in turn",
        "bounced",
        "written twice",
        "came back",
    ),
    *("ended as succeeded", "ended as failed", "ended as interrupted", "ended as lost"),
    *(
        "cancelled instead of going on",
        "lost for good",
        "poison",
        "waits after a loss",
        "got on before it was lost",
        "removed",
        "failed as an orphan",
        "left behind",
        "backfilled",
        "pruned",
        "schedule changed",
        "noticed",
        "made good",
        "acknowledged",
    ),
    *("closed", "slot opened", "skipped when opened", "waits again", "waits anew", "joined late"),
    *OF_PARTS,
    *(
        change(old, new)
        for old, following in TRANSITIONS.items()
        for new in following
        if (old, new) not in SELDOM
    ),
)
"""What has to be among it, or the examples prove too little."""


@pytest.fixture(params=KINDS)
def world(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_server: PostgresServer
) -> Iterator[World]:
    world = World(tmp_path, postgres_server if request.param == "postgresql" else None)
    yield world
    world.close()


def test_the_ledger_does_what_a_plain_model_of_it_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulthandler.cancel_dump_traceback_later()  # pytest's: the long form takes its time
    monkeypatch.setattr(logging.getLogger("batch_system.batch"), "disabled", True)
    monkeypatch.setattr(unserved, "GRACE", timedelta(seconds=60))
    monkeypatch.setattr(misfires, "BUDGET", 3)  # so that a downtime takes several transactions
    happened: Counter[str] = Counter()
    is_alone = world.ledger.kind == "sqlite"
    others = tuple(what for what in HAPPENS if what not in OF_PARTS)
    try:
        if LONG:
            _play(
                world,
                happened,
                (Nodes, Everything, Watchers, *(() if is_alone else (PartsBeside,))),
                (),
                least=1,
            )
        else:
            _play(
                world,
                happened,
                (Nodes, People, Watchers, *(() if is_alone else (Beside,))),
                others,
                least=2,
            )
            _play(
                world,
                happened,
                (Nodes, Partitions, *(() if is_alone else (PartsBeside,))),
                OF_PARTS,
                least=1,
            )
    finally:
        print(
            world.ledger.kind,
            *(f"{number:9,} {what}" for what, number in sorted(happened.items())),
            sep="\n",
        )
    lacking = [what for what in HAPPENS if not happened[what]]
    print(f"what has not happened: {', '.join(lacking) or 'nothing'}")
    assert LONG or lacking == []


def _play(
    world: World,
    happened: Counter[str],
    bases: tuple[type[Machine], ...],
    wanted: Sequence[str],
    least: int,
) -> None:
    """Some rounds, `least` or more, until all that is `wanted` has happened; in the long form
    one.
    """
    machine = type("Machine", bases, {"world": world, "happened": happened})
    for number, chosen in enumerate(SEEDS[:1] if LONG else SEEDS, start=1):
        run_state_machine_as_test(machine if LONG else seed(chosen)(machine), settings=SETTINGS)
        if number >= least and all(happened[what] for what in wanted):
            break
