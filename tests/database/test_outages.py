"""Databases that go away and come back, for services in real processes: nothing is lost, and
nothing is doubled.

All services begin at the same time, and have their outages at the same time. About 25 s.
OUTAGE_SECONDS makes each outage longer: 30 in `make faults`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from batch_system import BaseTask, start
from batch_system.batch.ledger import tables
from batch_system.config import Settings, forget_settings
from batch_system.database.engine import Database
from batch_system.errors import DatabaseUnreachable
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.server.uvicorn import offer_sign_in
from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer, find_binaries
from batch_system.verbs.tasks import ListTasks, PauseTask
from tests.outages import Case, locked, until
from tests.processes import SERVE, process

OUTAGE = float(os.environ.get("OUTAGE_SECONDS", "3"))
CALM = OUTAGE + 120

LONG = {"HEARTBEAT_SECONDS": "2", "LEASE_SECONDS": f"{OUTAGE * 4 + 30:g}"}
SHORT = {"HEARTBEAT_SECONDS": f"{OUTAGE / 6:g}", "LEASE_SECONDS": f"{OUTAGE:g}"}
QUICK = {"POLL_SECONDS": "0.2", "LOG_LEVEL": "INFO"}

SERVICES = (
    "both",
    "files",
    "only the ledger",
    "only the application",
    "both, short lease",
    "files, short lease",
)
SHORT_LEASES = [name for name in SERVICES if "short" in name]
LONG_LEASES = [name for name in SERVICES if "short" not in name]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """Six services that have lived through two outages, and were stopped in order."""
    with OwnServer(find_binaries(), fast=True) as server, ExitStack() as stack:
        cases = {name: make(name, tmp_path_factory.mktemp("case"), server) for name in SERVICES}
        for case in cases.values():
            case.service = stack.enter_context(process(case.folder, SERVE, case.settings))
        for case in cases.values():
            case.service.wait_until_ready()
        for name, case in cases.items():
            until(
                lambda case=case: case.witness("began", "patient") and case.written(),
                CALM,
                f"{name} works",
            )
        take_away_both(cases, server)
        take_away_the_other(cases)
        for name in SHORT_LEASES:
            # A busy machine may lose a short lease outside the outages too, and then the run waits.
            until(
                lambda case=cases[name]: case.rows(id=case.first, state="succeeded"),
                CALM,
                f"{name}: its run goes on",
            )
        with ThreadPoolExecutor(len(cases)) as threads:
            list(threads.map(lambda case: case.service.stop(within=30), cases.values()))
        yield cases


def make(name: str, folder: Path, server: OwnServer) -> Case:
    files = [f"sqlite+aiosqlite:///{folder}/{file}.db" for file in ("app", "ledger")]
    served = [wait_for(server.create_database()) for _ in files]
    application = files[0] if name.startswith("files") or name == "only the ledger" else served[0]
    ledger = files[1] if name.startswith("files") or name == "only the application" else served[1]
    return Case(
        folder / "service", application, ledger, {**QUICK, **(SHORT if "short" in name else LONG)}
    )


def take_away_both(cases: dict[str, Case], server: OwnServer) -> None:
    """PostgreSQL crashes, and somebody locks the files of the services that have nothing else."""
    of_files = [case for name, case in cases.items() if name.startswith("files")]
    server.stop("immediate")
    with locked(*(url for case in of_files for url in (case.application, case.ledger))):
        began_at = time.monotonic()
        for name in LONG_LEASES:
            cases[name].go_on()
        for name in LONG_LEASES:
            until(
                lambda name=name: cases[name].witness("ended", "patient"),
                CALM,
                f"{name}: its run ended in the outage",
            )
        for name in SHORT_LEASES:
            until(
                lambda name=name: "lease" in cases[name].readiness()[1],
                CALM,
                f"{name} has lost its lease",
            )
        time.sleep(max(0.0, began_at + OUTAGE - 3 - time.monotonic()))
        see(cases, "away")
    server.start()
    for name in SHORT_LEASES:
        cases[name].go_on()
    come_back(cases, "back")


def take_away_the_other(cases: dict[str, Case]) -> None:
    """The file of those that have one of each kind."""
    with locked(cases["only the ledger"].application, cases["only the application"].ledger):
        time.sleep(max(0.0, OUTAGE - 3))
        see(cases, "the other is away")
    come_back(cases, "the other is back")


def see(cases: dict[str, Case], moment: str) -> None:
    """All at once, for one that waits in vain takes three seconds to say so."""
    with ThreadPoolExecutor(len(cases)) as threads:
        for case, seen in zip(
            cases.values(), threads.map(Case.readiness, cases.values()), strict=True
        ):
            case.ready[moment] = seen
            assert case.service.get("/healthz").status_code == 200


def come_back(cases: dict[str, Case], moment: str) -> None:
    for name, case in cases.items():
        until(lambda case=case: case.readiness()[0] == 200, CALM, f"{name} is ready, {moment}")
    done = {name: len(case.rows(task="tick", state="succeeded")) for name, case in cases.items()}
    for name, case in cases.items():
        until(
            lambda c=case, n=name: len(c.rows(task="tick", state="succeeded")) > done[n] + 1,
            CALM,
            f"{name} fires",
        )
    see(cases, moment)


@pytest.fixture(params=SERVICES)
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def test_it_stays_up_and_says_which_database_is_away(cases: dict[str, Case]) -> None:
    away = {name: set(case.ready["away"][1]) for name, case in cases.items()}
    assert away == {
        "both": {"application", "ledger"},
        "files": {"application", "ledger"},
        "only the ledger": {"ledger"},
        "only the application": {"application"},
        "both, short lease": {"application", "ledger", "lease"},
        "files, short lease": {"application", "ledger", "lease"},
    }
    other = {name: set(case.ready["the other is away"][1]) for name, case in cases.items()}
    assert {name: wrong for name, wrong in other.items() if wrong} == {
        "only the ledger": {"application"},
        "only the application": {"ledger"},
    }
    for case in cases.values():
        assert {
            moment: code
            for moment, (code, wrong) in case.ready.items()
            if bool(wrong) != (code == 503)
        } == {}


def test_each_slot_of_the_outage_was_fired_late_and_once(case: Case) -> None:
    for task in ("tick", "writer"):
        slots = sorted(run["slot"] for run in case.rows(task=task))
        assert len(slots) == len(set(slots)) == (slots[-1] - slots[0]) / timedelta(seconds=1) + 1
    assert case.rows(tables.missed) == []
    found = case.accounts()
    assert len(found) == 3
    assert all(account.is_complete for account in found), found


def test_what_needs_no_database_ran_once_and_its_outcome_was_written_later(
    cases: dict[str, Case],
) -> None:
    for name in LONG_LEASES:
        case = cases[name]
        (run,) = case.rows(id=case.first)
        assert (run["state"], run["result"], run["attempt"], run["fence"]) == (
            "succeeded",
            "patience",
            1,
            1,
        ), name
        assert [line for line in case.witness("began", "patient") if line[0] == case.first] == [
            (case.first, 1)
        ]
        assert "lease" not in case.service.stderr, name


def test_a_run_whose_lease_ended_within_the_outage_was_given_up_and_resumed(
    cases: dict[str, Case],
) -> None:
    for name in SHORT_LEASES:
        case = cases[name]
        (run,) = case.rows(id=case.first)
        assert (run["state"], run["attempt"]) == ("succeeded", 1), name
        *given_up, last = [row["outcome"] for row in case.rows(tables.attempts, run=case.first)]
        assert given_up and (set(given_up), last) == ({"interrupted"}, "succeeded"), name
        ended = [line for line in case.witness("ended", "patient") if line[0] == case.first]
        assert ended == [(case.first, run["fence"])], name
        assert "gives up its runs" in case.service.stderr


def test_no_body_ran_twice_except_in_runs_that_were_given_up(case: Case) -> None:
    ended = Counter(case.witness("ended", "tick"))
    assert set(ended.values()) == {1}
    runs = {run["id"]: run for run in case.rows(task="tick")}
    assert {run for run, _ in ended} >= {
        id for id, run in runs.items() if run["state"] == "succeeded"
    }
    given_up = {row["run"] for row in case.rows(tables.attempts, outcome="interrupted")}
    twice = {run for run, number in Counter(run for run, _ in ended).items() if number > 1}
    assert twice <= given_up


def test_what_needs_the_application_database_was_tried_again_until_it_was_written_once(
    case: Case,
) -> None:
    written = Counter(case.written())
    assert set(written.values()) == {1}
    succeeded = {run["id"] for run in case.rows(task="writer", state="succeeded")}
    assert succeeded <= {run for run, _ in written}
    assert {run["state"] for run in case.rows(task="writer")} <= {
        "succeeded",
        "interrupted",
        "retrying",
        "queued",
    }


@pytest.fixture
async def away() -> AsyncIterator[Operations]:
    """What a service uses whose PostgreSQL refuses connections by now."""
    database = Database(
        "postgresql+asyncpg://nobody@127.0.0.1:1/none", setting="LEDGER_URL", pooled=False
    )
    yield Operations(database, database, Loaded, Settings(), are_ready=True)
    await database.dispose()


async def test_a_server_that_refuses_connections_is_unreachable_for_reading_and_for_changing(
    away: Operations,
) -> None:
    with pytest.raises(DatabaseUnreachable):
        await away(ListTasks())
    with pytest.raises(DatabaseUnreachable):
        await away(PauseTask(name="report"))


async def test_start_says_that_the_ledger_refuses_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Late(BaseTask):
        name, schedule = "late", None

        async def run(self) -> None: ...

    monkeypatch.setenv("LEDGER_URL", "postgresql+asyncpg://nobody@127.0.0.1:1/none")
    forget_settings()
    with pytest.raises(DatabaseUnreachable, match="LEDGER_URL"):
        await start(Late)


async def test_a_ledger_that_is_away_right_after_the_start_does_not_end_the_service(
    away: Operations, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service asks for tokens once it answers, to offer a link."""
    await offer_sign_in(SimpleNamespace(operations=away), "http://127.0.0.1:8000", Settings())  # type: ignore[arg-type]
    assert "no link to sign in is offered: the database" in capsys.readouterr().err
