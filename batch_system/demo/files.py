"""Writes the files of a folder in which the service can run: the tasks, its settings, and the files
of backups.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from batch_system.batch.nodes.process_lock import PREFIX, is_gone
from batch_system.demo.cast import CAST, SHIPPED, Part
from batch_system.errors import InvalidParameters, WrongState
from batch_system.settings.reading import Settings, forget_settings

SETTINGS: Mapping[str, str] = {
    "BATCH_VERSION": "2.14.1",
    "EXPORT_PARALLEL": "2",
    "MAX_RUNNING": "40",
    "DRAIN_SECONDS": "2",
    "RESTORE_DRILL_CRON": "0 4 * * *",
    "BACKUP_RETENTION_DAYS": "14",
    "BACKUP_KEEP_WEEKLY": "8",
    "BATCH_ALERT_BACKUP_AFTER": "93600",
}
"""The settings of the story, which its `.env` has."""


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Within the block the folder is the working directory, and the settings are those of the
    demonstration. Settings in the environment may name databases and channels of somebody else.
    """
    before, environment = Path.cwd(), dict(os.environ)
    own = _own_settings(folder)
    for name in environment:
        if name in Settings.model_fields or name.startswith("BATCH_"):
            del os.environ[name]
    os.environ.update(own)
    os.chdir(folder)
    forget_settings()
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
        forget_settings()


def _own_settings(folder: Path) -> dict[str, str]:
    return {
        "DATABASE_URL": f"sqlite+aiosqlite:///{folder / 'app.db'}",
        "LEDGER_URL": f"sqlite+aiosqlite:///{folder / 'ledger.db'}",
        "TASKS_DIR": "tasks",
        "BATCH_AUTH": "off",
        "HOST": "127.0.0.1",
    }


MARK = ".demo"
"""The file by which a folder of the demonstration is known."""


def take(folder: Path) -> None:
    """Take a folder that is missing, is empty, or was taken before. What else a folder has is never
    deleted.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise InvalidParameters(f"{folder} has other files; allowed: a missing or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("Made by `batch demo`, which deletes and writes files here.\n")


def refuse_running(folder: Path) -> None:
    """Leave the databases alone while a service uses them."""
    nodes = [file.name.removeprefix(PREFIX) for file in folder.glob(f"{PREFIX}*")]
    if any(not is_gone(folder, node) for node in nodes):
        raise WrongState(f"a service runs in {folder}: stop it first")


def write(folder: Path) -> None:
    """Write the tasks and `.env`. Databases of an earlier time are deleted."""
    take(folder)
    refuse_running(folder)
    for old in (*folder.glob("*.db*"), *folder.glob("tasks/*.py"), *folder.glob(f"{PREFIX}*")):
        old.unlink()
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / "tasks/__init__.py").write_text('"""The tasks of the demonstration."""\n')
    for part in CAST:
        source = _shipped(part) if part.name in SHIPPED else source_of(part)
        (folder / f"tasks/{part.name}.py").write_text(source)
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in SETTINGS.items()))


def write_backup(folder: Path, name: str, size: int) -> None:
    """A file of this size that takes no room on the disk: it has no content."""
    (folder / "backups").mkdir(exist_ok=True)
    with (folder / "backups" / name).open("wb") as file:
        file.truncate(size)


def _shipped(part: Part) -> str:
    return (
        f"from batch_system.shipped import {part.name}\n\n\n"
        f"class {part.class_name}({part.name}.{part.class_name}):\n"
        f'    """{part.description}."""\n'
    )


def source_of(part: Part) -> str:
    """The file of a task. Its runs only wait, or fail as in the story."""
    names = [
        "BaseTask",
        "get_logger",
        *(word for word in ("Retry", "RetryAfter") if f"{word}(" in _all_of(part)),
    ]
    modules = [name for name in ("httpx", "jinja2") if f"{name}." in (part.raises or "")]
    imports = "".join(f"import {name}\n" for name in modules)
    said = f"{part.parameter} {_all_of(part)}"
    times = ", ".join(name for name in ("datetime", "timedelta") if name in said)
    dates = f"from datetime import {times}\n" if times else ""
    parameters = f", {part.parameter}" if part.parameter else ""
    return f'''"""{part.description}. The work is made up."""

import asyncio
{dates}
{imports}{chr(10) if imports else ""}from batch_system import {", ".join(sorted(names))}

logger = get_logger(__name__)


class {part.class_name}(BaseTask):
    """{part.description}."""

{_attributes(part)}
    async def run(self{parameters}) -> dict[str, int]:
        rows = await self._work({"order" if part.condition else ""})
        logger.info("{part.says}", rows=rows)
        return {{"rows": rows}}

    async def _work(self{", order: int" if part.condition else ""}) -> int:
{_work(part)}'''


def _all_of(part: Part) -> str:
    return " ".join([part.raises or "", *(value for _, value in part.attributes)])


def _attributes(part: Part) -> str:
    pairs = {"name": repr(part.name), "schedule": repr(part.cron), "timezone": repr(part.zone)}
    pairs |= {name: repr(value) for name in ("owner", "runbook") if (value := getattr(part, name))}
    pairs |= dict(part.attributes)
    return "".join(f"    {name} = {value}\n" for name, value in pairs.items()).replace("'", '"')


def _work(part: Part) -> str:
    wait, result = (
        f"        await asyncio.sleep({part.usual:g})\n",
        f"        return {part.items}\n",
    )
    if part.raises is None:
        return wait + result
    lines = [f"logger.error({part.complains})"] if part.complains else []
    lines.append(f"raise {part.raises}")
    if part.condition:
        failing = "".join(f"            {line}\n" for line in lines)
        return f"        await asyncio.sleep(5)\n        if {part.condition}:\n{failing}{result}"
    return "        await asyncio.sleep(20)\n" + "".join(f"        {line}\n" for line in lines)
