"""Services that are killed, frozen, stopped and cut off at random: each slot is accounted for all
the same.

FAULT_COUNT, FAULT_SEED and FAULT_KINDS (names of faults, with commas) change the plan: `make
faults` runs the long form, each time with another seed. About 30 s for each database when the
machine is quiet, so `make test` disturbs PostgreSQL only.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from batch_system.testing.postgres import OwnServer, find_binaries
from tests.faults.checks import wrong
from tests.faults.evidence import gather, summary
from tests.faults.faults import disturb, plan
from tests.faults.world import World

COUNT = int(os.environ.get("FAULT_COUNT", "5"))
KINDS = os.environ.get("FAULT_KINDS", "")
SEED = int(os.environ.get("FAULT_SEED", "2611"))
AGAIN = (
    f"FAULT_SEED={SEED} FAULT_COUNT={COUNT} FAULT_KINDS={KINDS} .venv/bin/pytest -s "
    "tests/faults/test_faults.py"
)


@pytest.fixture(params=[pytest.param("sqlite", marks=pytest.mark.rest), "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        server = None
        if request.param == "postgresql":
            server = stack.enter_context(OwnServer(find_binaries(), fast=True))
        yield World(tmp_path, server, SEED, stack)


def test_whatever_is_done_to_them_each_slot_is_accounted_for_once(world: World) -> None:
    faulthandler.cancel_dump_traceback_later()  # pytest's: the long form takes its time
    print(f"again: {AGAIN} -k {world.kind}")
    disturb(world, plan(world.kind, SEED, COUNT, KINDS))
    evidence = gather(world)
    world.say(f"{COUNT} faults on {world.kind}, seed {SEED}: {dict(world.counts)}")
    world.say(summary(evidence))
    failures = wrong(world, evidence)
    assert not failures, "\n".join(failures)
