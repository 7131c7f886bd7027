"""Services that are killed, frozen, stopped and cut off at random: each slot is accounted for all the same.

FAULT_COUNT and FAULT_SEED change the plan: `make faults` runs the long form.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.testing.postgres import OwnServer, find_binaries
from tests.faults.world import World, disturb, wrong

COUNT = int(os.environ.get("FAULT_COUNT", "6"))
SEED = int(os.environ.get("FAULT_SEED") or secrets.randbelow(1_000_000))


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "sqlite":
        yield World(tmp_path, f"sqlite+aiosqlite:///{tmp_path}/app.db", None, SEED)
        return
    with OwnServer(find_binaries(), fast=True) as server:
        yield World(tmp_path, server.url, server, SEED)


def test_whatever_is_done_to_them_each_slot_is_accounted_for_once(world: World) -> None:
    try:
        disturb(world, COUNT)
        failures = wrong(world)
    finally:
        print(f"FAULT_SEED={SEED} on {world.kind}: {dict(world.counts)}", *world.timeline, sep="\n")
    assert failures == []
