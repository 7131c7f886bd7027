"""Files of SQLite that are deleted, replaced or damaged under a service: it says so, and ends.
About 9 s.

Each case is a process of its own, and all of them begin at the same time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from batch_system.batch.nodes.loop_watchdog import EXIT_CODE
from tests.outages import Case, until
from tests.processes import SERVE, process

SETTINGS = {"HEARTBEAT_SECONDS": "1", "POLL_SECONDS": "0.5", "LOG_LEVEL": "INFO"}
UNREADY = {"POLL_SECONDS": "1"}
"""How long a service lives on after it has found the loss: until its next poll."""
OUT_OF_ORDER = 3
WAIT = 30.0


def delete(file: Path) -> None:
    file.unlink()


def replace(file: Path) -> None:
    """Replaced by a copy of itself, as when somebody restores a file."""
    shutil.copy(file, file.with_suffix(".copy"))
    file.with_suffix(".copy").rename(file)


def delete_the_log(file: Path) -> None:
    file.with_name(f"{file.name}-wal").unlink()


def damage(file: Path) -> None:
    """Every page but the first one. A page that is still in the log is written again, so call it
    until it is read.
    """
    with file.open("r+b") as pages:
        pages.seek(4096)
        pages.write(b"\xff" * (file.stat().st_size - 4096))


LOST: dict[str, tuple[str, Callable[[Path], None]]] = {
    "the ledger is deleted": ("ledger.db", delete),
    "the ledger is replaced": ("ledger.db", replace),
    "the log of the application's database is deleted": ("app.db", delete_the_log),
    "the ledger is damaged": ("ledger.db", damage),
}
REPLACED = [name for name in LOST if "damaged" not in name]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """Services that have lost a file, and have ended. `ready` has what `/readyz` said before."""
    cases = {}
    with ExitStack() as stack:
        for name in LOST:
            folder = tmp_path_factory.mktemp("lost")
            urls = [f"sqlite+aiosqlite:///{folder}/{file}.db" for file in ("app", "ledger")]
            settings = {**SETTINGS, **(UNREADY if name in REPLACED else {"DRAIN_SECONDS": "1"})}
            cases[name] = case = Case(folder / "service", urls[0], urls[1], settings)
            case.service = stack.enter_context(process(case.folder, SERVE, case.settings))
        for case in cases.values():
            case.service.wait_until_ready()
            until(lambda case=case: case.written(), WAIT, "it works")
        for name, (file, lose) in LOST.items():
            lose(cases[name].folder.parent / file)
        lost = [cases[name] for name in REPLACED]
        until(lambda: all_unready(lost), WAIT, "each /readyz says so")
        for name in LOST:
            until(lambda name=name: has_ended(cases[name], name), WAIT, f"{name}: it ends")
        yield cases


def all_unready(lost: list[Case]) -> bool:
    """Ask each one in each round: it answers from one poll until the next, and then ends."""
    for case in lost:
        if "lost" not in case.ready and (answer := case.readiness())[0] == 503:
            case.ready["lost"] = answer
    return all("lost" in case.ready for case in lost)


def has_ended(case: Case, name: str) -> bool:
    file, lose = LOST[name]
    if lose is damage:
        damage(case.folder.parent / file)
    return case.service.process.poll() is not None


@pytest.mark.parametrize("name", REPLACED)
def test_a_file_that_was_deleted_or_replaced_makes_the_service_unready_and_end(
    cases: dict[str, Case], name: str
) -> None:
    case, (file, lose) = cases[name], LOST[name]
    path = f"{case.folder.parent / file}{'-wal' if lose is delete_the_log else ''}"
    said = f"the file {path} was deleted or replaced: restart it"
    status, reasons = case.ready["lost"]
    assert (status, reasons["ledger" if file == "ledger.db" else "application"]) == (503, said)
    assert {"lease", "service"} & reasons.keys(), (
        "nothing is fired or started any more: its lease is lost, or it is stopping already"
    )
    assert case.service.process.poll() == EXIT_CODE
    assert case.service.stderr.count(said) <= 3, (
        "one warning of the heartbeat, and why the process ends"
    )


def test_a_damaged_ledger_ends_the_service_with_one_critical_line(cases: dict[str, Case]) -> None:
    case = cases["the ledger is damaged"]
    assert case.service.process.poll() == EXIT_CODE
    told = [
        line
        for line in case.service.stderr.splitlines()
        if "critical" in line and "its file is damaged" in line
    ]
    assert len(told) == 1, case.service.stderr
    assert "ledger.db (LEDGER_URL)" in told[0] and "move" in told[0]


def test_a_service_does_not_start_on_a_damaged_file_and_says_what_to_do(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    ledger = cases["the ledger is damaged"]
    application = Case(
        tmp_path / "service", f"sqlite+aiosqlite:///{tmp_path}/app.db", ledger.ledger
    )
    (tmp_path / "app.db").write_bytes(b"no database" * 1000)
    (application.folder / "backups").mkdir()
    for name in (
        "backup_20261124_020000.backup.gz",
        "backup_20261125_020000.backup.gz",
        "notes.txt",
    ):
        (application.folder / "backups" / name).touch()
    file = ledger.folder.parent / "ledger.db"
    for log in file.parent.glob("ledger.db-*"):  # the log may have sound copies of the pages
        log.unlink()
    damage(file)
    starts = {"ledger": ledger, "application": application}
    with ExitStack() as stack:
        for case in starts.values():
            case.service = stack.enter_context(process(case.folder, SERVE, case.settings))
        for name, case in starts.items():
            until(
                lambda case=case: case.service.process.poll() is not None, WAIT, f"it ends: {name}"
            )
    assert {case.service.process.poll() for case in starts.values()} == {OUT_OF_ORDER}
    assert "Traceback" not in ledger.service.stderr + application.service.stderr
    of_ledger, of_application = (case.service.stderr.splitlines()[-1] for case in starts.values())
    said = (
        "ledger.db can't be used: database disk image is malformed: its file is damaged. Look at "
        "LEDGER_URL."
    )
    assert said in of_ledger and "Backups do not include the ledger" in of_ledger
    said = (
        "app.db can't be used: file is not a database: its file is damaged. Look at DATABASE_URL."
    )
    assert said in of_application
    assert of_application.endswith("batch backup restore backup_20261125_020000.backup.gz")
