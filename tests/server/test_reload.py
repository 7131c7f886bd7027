"""`batch serve --reload` in real processes: which changes cause a reload, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from batch_system.batch.ledger import tables
from batch_system.config import Settings
from batch_system.server import reload
from tests import processes
from tests.batch.ledger_world import rows, until
from tests.processes import ROOT, SERVE, START_SECONDS, Service, process, service, suspend
from tests.server.test_serve import (
    BY_HAND,
    QUICK_DRAIN,
    TICK,
    is_running,
    ledger_in,
    make_folder,
    succeeded,
)

RELOAD = (*SERVE, "--reload")
IN_A_GROUP = (
    "import os, sys; os.setsid(); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
AS_IN_A_TERMINAL = (sys.executable, "-c", IN_A_GROUP, *RELOAD[1:])
"""A process group of its own. A test sends Ctrl-C to every process in it, as a terminal does."""

WAITS = """
import asyncio, pathlib
from batch_system import BaseTask, current_run

class {cls}(BaseTask):
    name, schedule, overlap = "{name}", "* * * * * *", "skip"
    async def run(self):
        pathlib.Path("{name}.begun").touch()
        while not {over}:
            {check}
            await asyncio.sleep(0.02)
"""

BLOCKS = """
import pathlib, time
from batch_system import BaseTask

class Blocks(BaseTask):
    name, schedule = "blocks", "* * * * * *"
    async def run(self):
        pathlib.Path("blocks.begun").touch()
        while not pathlib.Path("go").exists():
            time.sleep(0.02)
"""


def waits(name: str, until: str, check: str = "pass") -> str:
    """A task that runs until the file `until` exists."""
    return WAITS.format(
        cls=name.title(), name=name, over=f"pathlib.Path({until!r}).exists()", check=check
    )


def ends_in_the_drain(name: str) -> str:
    """A task that runs until the first process of its folder begins to stop."""
    said = "'Stopping: ' in pathlib.Path('0.stderr').read_text()"
    return WAITS.format(cls=name.title(), name=name, over=f"({said})", check="pass")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_service(tmp_path_factory.mktemp("code"))


@pytest.fixture(autouse=True)
def own_code(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes run a copy of the service: a file of the real one may be saved while the tests
    run.
    """
    monkeypatch.setattr(processes, "ROOT", code)


def copy_of_the_service(folder: Path) -> Path:
    shutil.copytree(
        ROOT / "batch_system", folder / "batch_system", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def starts(running: Service) -> int:
    return running.stdout.count("Batch System on ")


def reloads(running: Service) -> list[str]:
    """The files that each reload named in the log."""
    return re.findall(r"reloading: (.*?) +\[batch_system", running.stderr)


async def says(text: Callable[[], str], part: str, times: int = 1, seconds: float = 20) -> None:
    async def said() -> bool:
        return text().count(part) >= times

    try:
        await until(said, seconds)
    except TimeoutError:
        raise AssertionError(f"{part!r} was not said {times} times:\n{text()}") from None


async def started(running: Service, times: int) -> None:
    await says(lambda: running.stdout, "Batch System on ", times)
    await asyncio.to_thread(running.wait_until_ready)


async def exists(path: Path) -> None:
    async def found() -> bool:
        return path.exists()

    await until(found, 20)


@contextmanager
def stopped(running: Service) -> Iterator[None]:
    """Stop the watching process during a change of several files, or it could see a part of them on
    a busy machine.
    """
    suspend(running.process.pid)
    try:
        yield
    finally:
        running.process.send_signal(signal.SIGCONT)


def is_refused(url: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        # The port was closed while the connection was made: the next one is refused.
        return False
    return False


async def refused(url: str, seconds: float = 10) -> None:
    async def closed() -> bool:
        return is_refused(url)

    await until(closed, seconds)


# What makes it reload.


async def test_several_files_that_change_together_are_one_reload_on_the_same_port(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path, by_hand=BY_HAND)
    with service(tmp_path, RELOAD) as running:
        with stopped(running):
            for number in range(5):
                make_folder(
                    tmp_path, **{f"new_{number}": BY_HAND.replace("by_hand", f"new_{number}")}
                )
        await started(running, 2)
        assert sorted(job["id"] for job in running.get("/scheduler/jobs").json()) == [
            "by_hand",
            *(f"new_{number}" for number in range(5)),
        ]
        (tmp_path / "tasks/new_0.py").unlink()
        await started(running, 3)
        assert reloads(running) == [
            ", ".join(f"tasks/new_{n}.py" for n in range(5)),
            "tasks/new_0.py",
        ]
        first, second, third = running.stdout.split("Batch System on ")[1:]
        assert first.split()[0] == second.split()[0] == third.split()[0] == running.url
        assert "  1 task," in first and "  6 tasks," in second and "  5 tasks," in third


@pytest.mark.nightly
async def test_a_change_of_env_reloads_and_its_tasks_dir_is_watched_from_then_on(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path, by_hand=BY_HAND)
    (tmp_path / "others").mkdir()
    with service(tmp_path, RELOAD) as running:
        (tmp_path / ".env").write_text("TASKS_DIR=others\n")
        await started(running, 2)
        (tmp_path / "others/there.py").write_text(BY_HAND.replace("by_hand", "there"))
        await started(running, 3)
        assert [job["id"] for job in running.get("/scheduler/jobs").json()] == ["there"]
        assert reloads(running) == [".env", "others/there.py"]


@pytest.mark.nightly
async def test_files_that_the_service_writes_do_not_reload_it(tmp_path: Path) -> None:
    """Everything is in one folder, which is the folder of the tasks too."""
    (tmp_path / "tick.py").write_text(TICK)
    settings = {"TASKS_DIR": ".", "BACKUP_DIR": "backups", "DATABASE_URL": "sqlite:///app.sqlite"}
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, RELOAD, settings) as running:
            for name in (
                "backups/a.backup",
                "service.log",
                "notes.txt",
                "__pycache__/tick.cpython-399.pyc",
                ".tick.py.swp",
            ):
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text("x")
            await succeeded(ledger, "tick", at_least=3)
            (tmp_path / "by_hand.py").write_text(BY_HAND)
            await started(running, 2)
            assert reloads(running) == ["by_hand.py"]
            assert (tmp_path / "app.sqlite").exists() and (tmp_path / "ledger.db").exists()


def test_a_reload_waits_until_no_more_files_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout of another branch may take longer than one scan."""
    with socket.socket() as listening:
        reloader = reload._Reloader(Settings(), listening)
    reloader._folder, reloader._is_ended = Path("tasks"), True
    reloader._seen = reload.sources(reloader._folder)
    files = [Path(f"tasks/{name}.py") for name in "abc"]
    left = iter(files)
    monkeypatch.setattr(
        reloader, "_sleep", lambda seconds: [path.touch() for path in itertools.islice(left, 1)]
    )
    assert reloader._wait_for_changes() == ", ".join(map(str, files))


def test_caches_hidden_files_and_data_are_no_sources(tmp_path: Path) -> None:
    for name in (
        "a.py",
        "inner/b.py",
        "__pycache__/a.py",
        ".venv/c.py",
        ".d.py",
        "e.pyc",
        "f.db",
        "g.log",
        "h.json",
    ):
        path = tmp_path / "tasks" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = {str(path) for path in reload.sources(Path("tasks")) if not path.is_absolute()}
    assert found == {"tasks/a.py", "tasks/inner/b.py"}
    assert Path(reload.__file__) in reload.sources(Path("tasks"))


def test_a_clones_own_application_and_the_files_with_settings_are_watched(tmp_path: Path) -> None:
    names = {".env", "pyproject.toml", "service/app.py"}
    (tmp_path / "service").mkdir()
    for name in names:
        (tmp_path / name).touch()
    assert {str(path) for path in reload.sources(Path("tasks")) if not path.is_absolute()} == names


# What does not end it.


async def test_a_syntax_error_in_a_task_file_is_reported_and_the_others_run(tmp_path: Path) -> None:
    make_folder(tmp_path, by_hand=BY_HAND)
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, RELOAD) as running:
            with stopped(running):
                make_folder(tmp_path, by_hand="def (", tick=TICK)
            await started(running, 2)
            assert "can't be used: tasks/by_hand.py: SyntaxError in line 1" in running.stdout
            await succeeded(ledger, "tick", at_least=1)
            make_folder(tmp_path, by_hand=BY_HAND)
            await started(running, 3)
            assert running.stdout.count("can't be used") == 1


@pytest.mark.nightly
async def test_an_error_in_the_service_or_its_settings_waits_for_the_next_change(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path, by_hand=BY_HAND)
    copy_of_the_service(tmp_path)  # the working directory is the first place that Python looks in
    broken = tmp_path / "batch_system/server/app.py"
    good = broken.read_text()
    with service(tmp_path, RELOAD) as running:
        broken.write_text(f"{good}\ndef (")
        await says(
            lambda: running.stderr,
            "the service has ended (exit code 1); it starts again when a file changes",
        )
        assert "SyntaxError" in running.stderr
        assert not is_refused(running.url)
        broken.write_text(good)
        await started(running, 2)

        (tmp_path / ".env").write_text("MAX_RUNNING=none\n")
        await says(lambda: running.stderr, "the service has ended (exit code 2)")
        assert "\nbatch: setting MAX_RUNNING: " in running.stderr
        (tmp_path / ".env").write_text("MAX_RUNNING=7\n")
        await started(running, 3)
        assert running.process.poll() is None
        assert reloads(running) == [
            "batch_system/server/app.py",
            "batch_system/server/app.py",
            ".env",
            ".env",
        ]


# What becomes of runs.


async def resumed_as_one_row(ledger: Any, run: dict[str, Any]) -> None:
    (end,) = await until(lambda: rows(ledger, id=run["id"], state="succeeded"), 20)
    tries = await rows(ledger, tables.attempts, run=run["id"])
    assert (end["attempt"], end["slot"]) == (1, run["slot"])
    assert [(row["number"], row["outcome"]) for row in tries] == [
        (1, "interrupted"),
        (1, "succeeded"),
    ]
    assert len(await rows(ledger, task=run["task"], slot=run["slot"])) == 1


async def test_a_reload_lets_short_runs_end_and_interrupts_long_ones_that_the_next_process_resumes(
    tmp_path: Path,
) -> None:
    """The long run sleeps through DRAIN_SECONDS, one stops at its checkpoint, and the short one
    ends in the drain.

    A request that comes in between is answered by the next process.
    """
    long = waits("long", until="after")
    stops = waits("stops", until="after", check="current_run().checkpoint()")
    make_folder(tmp_path, short=ends_in_the_drain("short"), long=long, stops=stops)
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, RELOAD, {"DRAIN_SECONDS": "2"}) as running:
            await asyncio.gather(
                *(exists(tmp_path / f"{name}.begun") for name in ("short", "long", "stops"))
            )
            before = {run["task"]: run for run in await rows(ledger, state="running")}
            make_folder(tmp_path, by_hand=BY_HAND)
            await says(lambda: running.stderr, "Stopping: 3 running, with 2 s to end")
            await until(lambda: knows(running, "by_hand"), START_SECONDS)
            assert starts(running) == 2
            (tmp_path / "after").touch()
            (short,) = await rows(ledger, id=before["short"]["id"])
            tries = await rows(ledger, tables.attempts, run=short["id"])
            assert (short["state"], [row["outcome"] for row in tries]) == (
                "succeeded",
                ["succeeded"],
            )
            await resumed_as_one_row(ledger, before["long"])
            await resumed_as_one_row(ledger, before["stops"])


async def knows(running: Service, task: str) -> bool:
    """Whether the process that answers has this task. The one that drains answers until it closes
    its socket.
    """
    with contextlib.suppress(httpx.TransportError):  # it has closed its connections just then
        jobs = await asyncio.to_thread(running.get, "/scheduler/jobs")
        return task in {job["id"] for job in jobs.json()}
    return False


GIVES_UP_SOON = (
    sys.executable,
    "-c",
    "from batch_system.config import get_settings; from batch_system.server import reload; "
    "reload.GIVE_UP_SECONDS = 0.5; reload.serve(get_settings(), port=0)",
)


async def test_a_task_that_blocks_the_event_loop_does_not_keep_the_reload_waiting(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path, blocks=BLOCKS)
    async with ledger_in(tmp_path) as ledger:
        with process(tmp_path, GIVES_UP_SOON, QUICK_DRAIN) as running:
            await says(lambda: running.stdout, "Batch System on ", seconds=START_SECONDS)
            await exists(tmp_path / "blocks.begun")
            make_folder(tmp_path, by_hand=BY_HAND)
            await says(
                lambda: running.stderr,
                "the service does not end, because a task blocks the event loop",
            )
            (tmp_path / "go").touch()
            await started(running, 2)
            (lost,) = await until(lambda: rows(ledger, tables.attempts, outcome="lost"), 20)
            await until(lambda: rows(ledger, id=lost["run"], state="succeeded"), 20)


# How it ends.


@pytest.mark.parametrize(
    ("send", "number"),
    [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)],
    ids=["Ctrl-C", "SIGTERM"],
)
async def test_one_signal_ends_both_processes_after_the_drain(
    tmp_path: Path, send: Callable[[int, int], None], number: int
) -> None:
    make_folder(tmp_path, short=ends_in_the_drain("short"), long=waits("long", until="never"))
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, AS_IN_A_TERMINAL, {"DRAIN_SECONDS": "1"}) as running:
            await asyncio.gather(
                *(exists(tmp_path / f"{name}.begun") for name in ("short", "long"))
            )
            send(running.process.pid, number)
            await says(lambda: running.stderr, "Stopping: 2 running, with 1 s to end")
            assert await asyncio.to_thread(running.process.wait, 30) == 0
            assert is_refused(running.url)
            assert starts(running) == 1 and "Traceback" not in running.stderr
        found = {(run["task"], run["state"]) for run in await rows(ledger)} - {
            ("short", "skipped"),
            ("long", "skipped"),
        }
        assert found == {("short", "succeeded"), ("long", "interrupted")}
        assert not await is_running(ledger, "long")


async def test_ctrl_c_while_a_reload_drains_ends_it_after_the_drain_and_starts_nothing(
    tmp_path: Path,
) -> None:
    """The serving process has not begun to drain when Ctrl-C comes, because its task blocks the
    event loop.
    """
    make_folder(tmp_path, blocks=BLOCKS)
    async with ledger_in(tmp_path) as ledger:
        with process(tmp_path, AS_IN_A_TERMINAL, {"DRAIN_SECONDS": "20"}) as running:
            await says(lambda: running.stdout, "Batch System on ", seconds=START_SECONDS)
            await exists(tmp_path / "blocks.begun")
            make_folder(tmp_path, by_hand=BY_HAND)
            await says(lambda: running.stderr, "reloading: ")
            os.killpg(running.process.pid, signal.SIGINT)
            (tmp_path / "go").touch()
            assert await asyncio.to_thread(running.process.wait, 10) == 0
            assert starts(running) == 1
        # A slot that was fired at the moment of the signal is left in the queue.
        assert {run["state"] for run in await rows(ledger)} <= {"succeeded", "skipped", "queued"}
        assert all(node["stopped_at"] for node in await rows(ledger, tables.nodes))


async def test_a_second_ctrl_c_does_not_wait_for_the_drain(tmp_path: Path) -> None:
    make_folder(tmp_path, long=waits("long", until="never"))
    with service(tmp_path, AS_IN_A_TERMINAL, {"DRAIN_SECONDS": "60"}) as running:
        await exists(tmp_path / "long.begun")
        os.killpg(running.process.pid, signal.SIGINT)
        await says(lambda: running.stderr, "Stopping: 1 running")
        os.killpg(running.process.pid, signal.SIGINT)
        await asyncio.to_thread(running.process.wait, 30)
        assert is_refused(running.url)


async def test_when_the_reloader_is_killed_its_child_drains_and_frees_the_port(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path, long=waits("long", until="never"))
    async with ledger_in(tmp_path) as ledger:
        with service(tmp_path, RELOAD, QUICK_DRAIN) as running:
            await exists(tmp_path / "long.begun")
            running.process.kill()
            running.process.wait()
            await refused(running.url)
            await until(lambda: rows(ledger, state="interrupted"))


async def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    make_folder(tmp_path, by_hand=BY_HAND)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with process(tmp_path, (*RELOAD[:-3], "--port", str(port), "--reload")) as running:
            assert await asyncio.to_thread(running.process.wait, 20) == 2
            assert (
                running.stderr
                == f"batch: port {port} on 127.0.0.1 is in use: stop the process that listens "
                "there, or change PORT\n"
            )
