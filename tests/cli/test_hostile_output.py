"""Nothing that a command prints controls a terminal, wherever it comes from: a row, a task's file,
a setting, a backup.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, Column, LargeBinary, Table, insert
from sqlalchemy.types import TypeEngine

from batch_system.batch.ledger import run_logs, tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.batch.ledger.tables import new_id
from batch_system.database.companions import companions
from batch_system.database.engine import Database
from batch_system.database.types import Id, UtcDateTime
from tests.commands import Batch, Done, in_this_process
from tests.databases import SQLiteFiles
from tests.hostile import HOSTILE, SEEN, acts
from tests.migrations import APPLICATION_HISTORIES

AT = datetime(2026, 11, 25, 2, 0, tzinfo=UTC)
TEXT = "".join(HOSTILE.values()).replace("\ud800", "") + f"[red] [/] {SEEN}\n--- attempt 9 ---\n"
"""All of it. (SQLite stores no half of a surrogate pair.)"""


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


def is_harmless(done: Done, code: int | None = 0) -> Done:
    assert code is None or done.code == code, (done.out, done.err)
    for written in (done.out, done.err):
        assert not {char for char in written if acts(char)}, written
        assert not [
            line for line in written.splitlines() if line.startswith(("Traceback", "--- attempt 9"))
        ], written
    return done


def hostile_row(table: Table, **given: Any) -> dict[str, Any]:
    """A value for each column; what can hold a text holds TEXT."""
    return {c.name: given[c.name] if c.name in given else _value(c, c.type) for c in table.c}


def _value(column: Column[Any], kind: TypeEngine[Any]) -> Any:
    if isinstance(kind, JSON):
        return {TEXT: [TEXT], "type": TEXT, "message": TEXT, "traceback": TEXT}
    if isinstance(kind, LargeBinary):
        raise AssertionError(f"{column} needs a value of its own")
    if isinstance(kind, UtcDateTime):
        return AT
    values: dict[type, Any] = {str: TEXT, int: 1, float: 1.0, bool: True}
    return new_id() if kind is Id else values[kind.python_type]


@pytest.fixture
async def run(
    tmp_path: Path, sqlite_databases: SQLiteFiles, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A run's id. There is a ledger and an application with a hostile row in each table."""
    run, node = new_id(), new_id()
    given: dict[str, dict[str, Any]] = {
        "batch_runs": {"id": run, "node": node, "state": "failed"},
        "batch_attempts": {"run": run, "node": node},
        "batch_nodes": {"id": node},
        "batch_quarantine": {"run": run},
        "batch_once": {"run": run},
        "batch_checkpoints": {"run": run},
        "batch_tasks": {"paused_at": None},
        "batch_backups": {"name": "backup_20261125_020000.backup.gz"},
        "batch_previews": {"ids": b""},
    }
    urls = {}
    for name, histories, metadata in (
        ("LEDGER_URL", (LEDGER_HISTORY,), tables.ledger),
        ("DATABASE_URL", APPLICATION_HISTORIES, companions),
    ):
        urls[name] = await sqlite_databases.make(tmp_path / f"{name}.db", *histories)
        monkeypatch.setenv(name, urls[name])
        database = Database(urls[name], setting=name, pooled=False)
        async with database.engine.begin() as connection:
            for table in metadata.sorted_tables:
                if table is not tables.log:
                    await connection.execute(
                        insert(table), hostile_row(table, **given.get(table.name, {}))
                    )
            if metadata is tables.ledger:
                line = LogLine(TEXT, TEXT, TEXT, TEXT)
                await run_logs.write(connection, run_logs.pack([Block(run, 1, 1, 0, [line, line])]))
    return run


COMMANDS = [
    ("runs",),
    ("runs", "--json"),
    ("nodes",),
    ("nodes", "--json"),
    ("changes",),
    ("changes", "--json"),
    ("show", "RUN"),
    ("show", "RUN", "--json"),
    ("show", TEXT),
    ("show", TEXT, "--json"),
    ("logs", "RUN"),
    ("logs", "RUN", "--json"),
    ("quarantine", "RUN"),
    ("quarantine", "RUN", "--json"),
    ("tasks",),
    ("tasks", "--json"),
    ("quarantine",),
    ("quarantine", "--json"),
    ("runs", "--task", TEXT),
    ("runs", "--tag", TEXT),
    ("status",),
    ("status", "--json"),
    ("token", "list"),
    ("token", "list", "--json"),
    ("token", "revoke", TEXT),
    ("migrate", "--to", TEXT),
    ("backup", "delete", TEXT),
    ("backup", "restore", "latest", "--into", TEXT),
    ("retry", "--task", TEXT),
    ("account",),
    ("account", "--since", "2026-11-24", "--slots"),
    ("account", "--since", "2026-11-24", "--slots", "--json"),
    ("account", "--json"),
    ("watch", "RUN"),
    ("cancel", "RUN"),
    ("redrive", "RUN"),
    ("retry", "RUN"),
    ("pause", TEXT),
    ("pause", TEXT),
    ("resume", TEXT),
    ("prune", "--dry-run"),
    ("backup", "list"),
    ("backup", "list", "--json"),
    ("backup", "prune", "--dry-run"),
]


@pytest.mark.rest
async def test_no_text_of_the_ledger_acts_in_a_terminal(
    run: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    def all_commands() -> dict[tuple[str, ...], Done]:
        batch = next(calls := in_this_process(capsys, monkeypatch))
        done = {
            words: is_harmless(batch(*(run if w == "RUN" else w for w in words)), None)
            for words in COMMANDS
        }
        next(calls, None)
        return done

    done = await asyncio.to_thread(all_commands)
    for words in COMMANDS[:14]:
        assert done[words].code == 0, (words, done[words].err)
        assert SEEN in done[words].out, words
    shown = json.loads(done["show", "RUN", "--json"].out)
    assert shown["task"] == shown["attempts"][0]["error"]["traceback"] == TEXT
    assert "\\x1b[2J" in done["show", "RUN"].out and "[red] [/]" in done["runs",].out


TASK = f"""
import json
from batch_system import BaseTask, current_run, get_logger

text = json.loads({json.dumps(json.dumps(TEXT))})

class Hostile(BaseTask):
    name, schedule = "hostile", "0 2 * * *"
    description = text
    async def run(self, ends: str = text) -> object:
        current_run().progress(1, 2, text)
        get_logger("hostile").warning(text, value=text)
        if ends == "badly":
            raise type("Error" + text.replace("\\0", ""), (Exception,), {{}})(text)
        return {{"found": text, text: [text]}}
"""


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_no_text_of_an_author_acts_in_a_terminal(batch: Batch, tmp_path: Path, ends: str) -> None:
    (tmp_path / "tasks/hostile.py").write_text(TASK)
    done = is_harmless(batch("run", "hostile", "--param", f"ends={ends}"), int(ends == "badly"))
    assert SEEN in done.out and SEEN in done.err
    if ends == "well":
        assert json.loads(done.out.splitlines()[-1])["found"] == TEXT.replace(
            "\0", "\N{SYMBOL FOR NULL}"
        )
    for words in (
        ("show", "hostile"),
        ("tasks",),
        ("logs", "hostile"),
        ("watch", "hostile"),
        ("runs",),
        ("lint",),
    ):
        is_harmless(batch(*words), None)


def test_no_text_of_a_file_that_cannot_be_used_acts_in_a_terminal(
    batch: Batch, tmp_path: Path
) -> None:
    (tmp_path / f"tasks/{HOSTILE['ESC']}.py").write_text(
        f"import json\nraise ValueError(json.loads({json.dumps(TEXT)!r}))"
    )
    for command in ("tasks", "lint"):
        done = is_harmless(batch(command), 1)
        assert SEEN in done.out + done.err
    is_harmless(batch("run", TEXT), 2)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_a_person_types_does_not_act_in_the_error_about_it(batch: Batch, text: str) -> None:
    for words in (
        ("show", text),
        ("next", text),
        ("next", "* * * * *", "--tz", text),
        ("runs", "--since", text),
        ("runs", "--state", text),
        ("runs", "--limit", text),
        ("runs", f"--{text}"),
        (text,),
        ("new", text),
        ("backup", "show", text),
        ("backup", "verify", f"s3://{text}"),
    ):
        is_harmless(batch(*words), 2)


def test_a_setting_does_not_act_in_the_error_about_it(batch: Batch) -> None:
    text = TEXT.replace("\0", "")
    is_harmless(batch("tasks", LOG_LEVEL=text), 2)


def test_names_of_tables_in_a_backup_do_not_act(batch: Batch, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "app.db")) as connection:
        for number, text in enumerate([*HOSTILE.values(), "[red]", f"two\nlines {SEEN}"]):
            if "\0" not in text and "\ud800" not in text:
                connection.execute(
                    f'CREATE TABLE "{number}{text}" ("id{text}" INTEGER PRIMARY KEY, "v{text}" '
                    "TEXT)"
                )
    for words in (
        ("backup", "create"),
        ("backup", "show", "latest"),
        ("backup", "show", "latest", "--json"),
        ("backup", "list"),
        ("backup", "verify"),
        ("backup", "diff", "latest"),
        ("backup", "diff", "latest", "--json"),
        ("backup", "restore", "latest", "--dry-run"),
    ):
        is_harmless(batch(*words))
