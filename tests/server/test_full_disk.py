"""A disk that is full: real processes with their databases on a small one of their own. About 12 s.

A tmpfs in a mount namespace is that disk, so it is gone with the process. Where nobody may have
one, the tests that need it are skipped; those below in `tests/database/test_full_disk.py` need
none.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import make_url

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import PostgresServer
from tests.outages import Case, execute, until
from tests.processes import SERVE, process, suspend

NAMESPACE = (
    ["unshare", "--mount"]
    if os.geteuid() == 0
    else ["unshare", "--user", "--map-root-user", "--mount"]
)
MOUNT = "mount -t tmpfs -o size=8m small disk"
SETTINGS = {
    "POLL_SECONDS": "0.2",
    "HEARTBEAT_SECONDS": "1",
    "LEASE_SECONDS": "120",
    "BATCH_AUTH": "off",
}
FILES = {"ledger": "ledger.db", "application": "app.db"}
SETTING = {"ledger": "LEDGER_URL", "application": "DATABASE_URL"}
WAIT = 120.0


@pytest.fixture(scope="module")
def small_disks() -> None:
    with contextlib.suppress(OSError):
        if (
            subprocess.run(
                [*NAMESPACE, "mount", "-t", "tmpfs", "small", "/mnt"], capture_output=True
            ).returncode
            == 0
        ):
            return
    pytest.skip("nobody may mount a tmpfs here")


@pytest.fixture(scope="module")
def cases(small_disks: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """Two services, one with its ledger on a small disk, one with its application's, that were full
    for a while.
    """
    cases = {part: make(part, tmp_path_factory.mktemp("full")) for part in FILES}
    with contextlib.ExitStack() as stack:
        for case in cases.values():
            case.service = stack.enter_context(process(case.folder, on_small_disk(), case.settings))
        for case in cases.values():
            case.service.wait_until_ready()
        for name, case in cases.items():
            until(lambda case=case: case.witness("began", "patient"), WAIT, f"{name} works")
            fill(case)
            case.go_on()
        work_on_full_disks(**cases)
        for case in cases.values():
            assert case.service.get("/healthz").status_code == 200
            disk_of(case).joinpath("ballast").unlink()
        come_back(**cases)
        for case in cases.values():
            keep_a_copy(case)
        yield cases


def work_on_full_disks(ledger: Case, application: Case) -> None:
    until(
        lambda: "its disk is full" in str(ledger.readiness()[1].get("ledger")),
        WAIT,
        "/readyz says so",
    )
    for case, what in ((ledger, "ledger"), (application, "application's database")):
        status = case.service.get("/api/v1/status").json()
        assert (status["level"], status["headline"]) == (
            "alarm",
            f"The disk of the {what} is full: make room there",
        )
    until(lambda: ledger.witness("ended", "patient"), WAIT, "what needs no database goes on")
    until(
        lambda: application.rows(task="writer", state="retrying"),
        WAIT,
        "what needs one is tried again",
    )


def come_back(ledger: Case, application: Case) -> None:
    for case in (ledger, application):
        until(lambda case=case: case.readiness()[0] == 200, WAIT, "it is ready again")
    # Outcomes of many runs that are written at once have one line.
    written = re.compile(f"patient succeeded .*{ledger.first}|[0-9]+ runs succeeded")
    until(lambda: written.search(ledger.service.stderr), WAIT, "what waited was written")
    until(
        lambda: not application.rows(task="writer", state="retrying"),
        WAIT,
        "what was tried again is done",
    )


def make(part: str, folder: Path) -> Case:
    files = {name: str(folder / file) for name, file in FILES.items()}
    case = Case(
        folder / "service",
        *(f"sqlite+aiosqlite:///{files[name]}" for name in ("application", "ledger")),
    )
    (case.folder / "disk").mkdir()
    case.settings |= {**SETTINGS, SETTING[part]: f"sqlite:///disk/{FILES[part]}"}
    return case


def on_small_disk(then: str = "") -> list[str]:
    """The command that serves with `disk` as the small one. `then`: what the shell does before."""
    script = f"{MOUNT} && cp ../app.db disk/ && {then or 'true'} && exec {shlex.join(SERVE)}"
    return [*NAMESPACE, "sh", "-c", script]


def disk_of(case: Case) -> Path:
    """As that process sees it."""
    return Path(f"/proc/{case.service.process.pid}/root{case.folder}/disk")


def fill(case: Case) -> None:
    with contextlib.suppress(OSError), (disk_of(case) / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def keep_a_copy(case: Case) -> None:
    """The disk disappears with its process, which is stopped in the middle of its work, as by a
    crash.
    """
    suspend(case.service.process.pid)
    shutil.copytree(disk_of(case), case.folder / "kept")
    case.service.stop(signal.SIGKILL)
    for part, file in FILES.items():
        if f"disk/{file}" in case.settings[SETTING[part]]:
            setattr(case, part, f"sqlite+aiosqlite:///{case.folder}/kept/{file}")


@pytest.mark.parametrize("part", FILES)
def test_the_log_says_which_disk_is_full_and_what_to_do(cases: dict[str, Case], part: str) -> None:
    told = cases[part].service.stderr
    where = rf"sqlite\S+/disk/{FILES[part]} \({SETTING[part]}\)"
    said = rf"({where}: )?database or disk is full: ({where}: )?its disk is full; make room there"
    assert re.search(said, told), told[-3000:]


@pytest.mark.parametrize("part", FILES)
def test_nothing_is_corrupt(cases: dict[str, Case], part: str) -> None:
    for url in (cases[part].application, cases[part].ledger):
        with contextlib.closing(sqlite3.connect(str(make_url(url).database))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("part", FILES)
def test_no_slot_is_lost_and_nothing_is_doubled(cases: dict[str, Case], part: str) -> None:
    is_each_slot_one_run(cases[part])


def is_each_slot_one_run(case: Case) -> None:
    for task in ("tick", "writer"):
        slots = sorted(run["slot"] for run in case.rows(task=task))
        assert len(slots) == len(set(slots)) == (slots[-1] - slots[0]) / timedelta(seconds=1) + 1
    assert all(account.is_complete for account in case.accounts())
    ran = Counter(run for run, _ in case.witness("ended", "tick"))
    assert set(ran.values()) == {1}
    assert {run["id"] for run in case.rows(task="tick", state="succeeded")} <= ran.keys()
    written = Counter(case.written())
    assert set(written.values()) == {1}
    assert {run["id"] for run in case.rows(task="writer", state="succeeded")} <= {
        run for run, _ in written
    }


def test_a_run_that_ended_while_the_ledger_was_full_is_written_when_there_is_room(
    cases: dict[str, Case],
) -> None:
    case = cases["ledger"]
    (run,) = case.rows(id=case.first)
    assert (run["state"], run["result"], run["attempt"], run["fence"]) == (
        "succeeded",
        "patience",
        1,
        1,
    )


FULL = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE 'could not extend file' USING ERRCODE = 'disk_full'; END $$
"""
REFUSE = "CREATE TRIGGER refuse BEFORE INSERT ON batch_runs EXECUTE FUNCTION refuse()"
ALLOW = "DROP TRIGGER refuse ON batch_runs"


def test_a_full_disk_of_postgresql_is_outlived_too(
    tmp_path: Path, postgres_server: PostgresServer
) -> None:
    """The server refuses to insert, with the error that it has then."""
    url = wait_for(postgres_server.create_database())
    case = Case(tmp_path / "service", url, url, SETTINGS)
    with process(case.folder, SERVE, case.settings) as case.service:
        case.service.wait_until_ready()
        for statement in (FULL, REFUSE):
            wait_for(execute(url, statement))
        said = (
            "(LEDGER_URL): could not extend file: the disk of its server is full; make room there"
        )
        until(lambda: said in case.service.stderr, WAIT, "the log says so")
        until(lambda: "ledger" in case.readiness()[1], WAIT, "/readyz says so")
        wait_for(execute(url, ALLOW))
        until(lambda: case.readiness()[0] == 200, WAIT, "it is ready again")
        until(lambda: len(case.rows(task="tick", state="succeeded")) > 3, WAIT, "it fires")
        case.go_on()
        case.service.stop(within=30)
    is_each_slot_one_run(case)


@pytest.mark.rest
@pytest.mark.parametrize(("file", "setting"), [(FILES[part], SETTING[part]) for part in FILES])
def test_a_service_does_not_start_on_a_full_disk_and_says_why(
    small_disks: None, tmp_path: Path, file: str, setting: str
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path.parent / "app.db").touch()
    full = on_small_disk("(cat /dev/zero > disk/ballast 2>/dev/null; true)")
    with process(tmp_path, full, {setting: f"sqlite:///disk/{file}"}) as started:
        assert started.process.wait(WAIT) not in (0, None)
        (line,) = [line for line in started.stderr.splitlines() if "full" in line]
    assert re.search(rf"disk/{file} can't be used: .*its disk is full.* Look at {setting}", line), (
        line
    )
    assert "Traceback" not in started.stderr
