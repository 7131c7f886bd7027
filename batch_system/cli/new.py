"""`batch new`: writes the first version of a task's file and of its test."""

from __future__ import annotations

import keyword
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated

import typer

from batch_system.cli.opening import refuse_service
from batch_system.cli.options import AsJson
from batch_system.errors import BatchError, InvalidParameters, InvalidSetting
from batch_system.escaping import echoed

if TYPE_CHECKING:
    from batch_system.batch.cron.cron import Schedule

NO_SCHEDULE = "none"

START = datetime(2026, 1, 1, tzinfo=UTC)
"""The instant at which the clock of a test begins.

It is repeated here, because the module that defines it imports pytest, which may not be installed
on a server.
"""

TASK = Template('''\
from batch_system import BaseTask, get_logger

logger = get_logger(__name__)


class $cls(BaseTask):
    """Say here in one line what this task does."""

    name = "$name"
    schedule = $schedule

    ${async_}def run(self) -> None:
        logger.info("$name has work to do")
''')

TEST = Template('''\
"""Tests of $file. The fixture `batch` comes with the service."""

import pytest
${before}from batch_system.testing import Batch
${after}from $package import $cls


@pytest.mark.asyncio
async def test_${module}_succeeds(batch: Batch) -> None:
    run = await batch.run($cls)
    assert run.state == "succeeded", run.reason
''')

TEST_OF_SCHEDULE = Template("""

@pytest.mark.asyncio
async def test_${module}_fires_on_schedule(batch: Batch) -> None:
    batch.only($cls)
    [run] = await batch.advance($until)  # from $start
    assert run.state == "succeeded", run.reason
""")

PYTEST_INI = Path("pytest.ini")
PYTEST_SETTINGS = """\
[pytest]
asyncio_default_fixture_loop_scope = function
"""
"""pytest-asyncio warns as long as this setting is not set."""

PYTEST_SECTIONS = {
    "pytest.toml": "",
    ".pytest.toml": "",
    "pytest.ini": "",
    ".pytest.ini": "",
    "pyproject.toml": "[tool.pytest",
    "tox.ini": "[pytest]",
    "setup.cfg": "[tool:pytest]",
}
"""Where pytest looks for its settings, and what such a file has to contain so that they are there.
"""


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task's name: a-z 0-9 _ . -")],
    schedule: Annotated[
        str,
        typer.Option(
            help="A cron expression in quotes, or `none` for a task that is started by hand."
        ),
    ] = "0 2 * * *",
    sync: Annotated[
        bool,
        typer.Option(
            "--sync", help="Write a run() that may block, because it is executed in a thread."
        ),
    ] = False,
    tests: Annotated[Path, typer.Option(help="The folder for the test.")] = Path("tests"),
    as_json: AsJson = False,
) -> None:
    """Write the file of a new task, and its test.

    The file is written to TASKS_DIR. If this setting is not set, the folder is `tasks`, which is
    created if necessary. If pytest has no settings here yet, pytest.ini is written too. No file is
    overwritten.
    """
    refuse_service("`batch new`")
    from batch_system import console
    from batch_system.batch.tasks.discovery import folder_of
    from batch_system.batch.tasks.task_schedule import schedule_for
    from batch_system.settings.reading import get_settings

    settings = get_settings()
    if "TASKS_DIR" not in settings.model_fields_set:
        settings.TASKS_DIR.mkdir(exist_ok=True)
    folder = folder_of(settings.TASKS_DIR)
    module = _module(name)
    cron = None if schedule == NO_SCHEDULE else schedule_for(schedule, "UTC", lambda: name)
    task, test = folder / f"{module}.py", tests / f"test_{module}.py"
    values = {
        "name": name,
        "cls": _class(module),
        "module": module,
        "schedule": f'"{cron.given or cron.cron}"' if cron else "None",
        "async_": "" if sync else "async ",
        "file": task.as_posix(),
        "package": _package(settings.TASKS_DIR, module),
        **_blank_lines(),
    }
    test_text = TEST.substitute(values) + (_test_of(cron, values) if cron else "")
    files = {task: TASK.substitute(values), test: test_text}
    if not (
        init := folder / "__init__.py"
    ).exists():  # without it, Python may import another package named `tasks`
        files[init] = '"""The tasks of this service, one file each."""\n'
    if not _has_pytest_settings():
        files[PYTEST_INI] = PYTEST_SETTINGS
    _write(files)
    if as_json:
        console.show_json({"task": name, "files": [path.as_posix() for path in files]})
        return
    when = cron.words if cron else "Started by hand"
    lines = [
        f"{task}  the task {name}: {when[0].lower()}{when[1:]}",
        f"{test}  its test",
        "",
        "Write its run(), then:",
    ]
    if PYTEST_INI in files:
        lines.insert(2, f"{PYTEST_INI}  the settings of pytest")
    for line in (
        *lines,
        f"  python -m pytest {test}",
        f"  batch lint {name}",
        f"  batch run {name}",
    ):
        console.say(line)


def _module(name: str) -> str:
    """The name of the file without `.py`. Dots and dashes become underscores, because Python can't
    import them.
    """
    from batch_system.batch.tasks.declaration import NAME

    if not NAME.fullmatch(name):
        raise InvalidParameters(f"the name is {echoed(name)}; allowed: 1 to 100 of a-z 0-9 _ . -")
    module = re.sub(r"[.-]", "_", name)
    if not module[0].isalpha() or keyword.iskeyword(module):
        raise InvalidParameters(
            f"the name is {echoed(name)}, and Python can't import a file that is called "
            f"{module}.py; allowed here: a name that begins with a letter, and is no keyword of "
            "Python"
        )
    return module


def _class(module: str) -> str:
    return "".join(part.capitalize() for part in module.removesuffix("_task").split("_")) + "Task"


def _package(folder: Path, module: str) -> str:
    """The dotted name by which a test imports the module, from the working directory or the parent
    of `folder`.
    """
    if not folder.is_dir():  # the name of a package
        return f"{folder}.{module}"
    path = folder.resolve()
    parts = path.relative_to(Path.cwd()).parts if path.is_relative_to(Path.cwd()) else (path.name,)
    if not all(part.isidentifier() for part in parts):
        raise InvalidSetting(
            f"setting TASKS_DIR is {echoed(str(folder))}, which a test can't import; allowed: "
            "names of a-z 0-9 _"
        )
    return ".".join((*parts, module))


def _blank_lines() -> dict[str, str]:
    """The blank lines before and after the import of this package, so that the imports of the test
    are sorted.

    In a clone of the service it is sorted with the tasks, and in other projects with pytest.
    """
    is_clone = Path("batch_system", "__init__.py").exists()
    return {"before": "\n" if is_clone else "", "after": "" if is_clone else "\n"}


def _has_pytest_settings() -> bool:
    """Whether pytest finds settings in the working directory or in a folder above it."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        for name, section in PYTEST_SECTIONS.items():
            with suppress(OSError):  # there is no such file, or it belongs to another user
                if section in (folder / name).read_text(encoding="utf-8", errors="replace"):
                    return True
    return False


def _test_of(cron: Schedule, values: dict[str, str]) -> str:
    first = cron.next(START)
    assert first is not None  # a schedule that never fires would have been refused
    return TEST_OF_SCHEDULE.substitute(values, until=_arguments(first - START), start=_utc(START))


def _arguments(interval: timedelta) -> str:
    """The interval as the arguments of advance(), such as `hours=2`."""
    minutes, seconds = divmod(interval.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts = {"days": interval.days, "hours": hours, "minutes": minutes, "seconds": seconds}
    return ", ".join(f"{unit}={number}" for unit, number in parts.items() if number)


def _utc(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _write(files: dict[Path, str]) -> None:
    existing = [str(file) for file in files if file.exists()]
    if existing:
        raise InvalidParameters(
            f"nothing was written, because these files exist already: {', '.join(existing)}"
        )
    for file, text in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8") as opened:
                opened.write(text)
        except OSError as error:
            raise BatchError(f"{file} can't be written: {error.strerror}") from error
