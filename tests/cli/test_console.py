"""Lists: a table in a terminal, plain columns when piped, or JSON."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from batch_system import console
from tests.processes import BATCH, environment

AT = datetime(2026, 11, 25, 2, 0, 0, 123456, tzinfo=UTC)
BOLD = "\x1b[1m"


def in_terminal(folder: Path, command: list[str], columns: int, **settings: str) -> str:
    """The output of `command` in a real terminal of this width, with line ends as in a file."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {**environment(), "TERM": "xterm"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        env.pop(name, None)
    env |= settings
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    written = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    assert process.wait(20) == 0
    return written.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError as error:  # what Linux says when the other side is closed
        if error.errno != errno.EIO:
            raise
        return b""


def without_styles(text: str) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]


def show_in_terminal(
    folder: Path, rows: list[dict[str, Any]], columns: list[str], width: int
) -> list[str]:
    code = f"from batch_system.console import show; show({rows!r}, {columns!r}, False)"
    return without_styles(in_terminal(folder, [sys.executable, "-c", code], width))


def plain(capsys: pytest.CaptureFixture[str], *rows: dict[str, Any]) -> list[str]:
    console.show(rows, list(rows[0]), as_json=False)
    return capsys.readouterr().out.splitlines()


def test_json_is_an_array_with_every_key_and_instants_in_iso_8601(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.show([{"id": "x", "at": AT, "reason": None, "name": "日次"}], ["id"], as_json=True)
    out = capsys.readouterr().out
    assert json.loads(out) == [
        {"id": "x", "at": "2026-11-25T02:00:00.123456Z", "reason": None, "name": "日次"}
    ]
    assert "日次" in out


def test_json_of_nothing_is_an_empty_array(capsys: pytest.CaptureFixture[str]) -> None:
    console.show([], ["id"], as_json=True)
    assert capsys.readouterr().out == "[]\n"


def test_piped_columns_line_up_and_carry_no_escape_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plain(
        capsys, {"name": "a", "schedule": "* * * * *"}, {"name": "longer", "schedule": "@daily"}
    ) == [
        "name    schedule",
        "a       * * * * *",
        "longer  @daily",
    ]


def test_wide_characters_line_up_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(capsys, {"name": "日次", "state": "failed"}, {"name": "abcd", "state": "failed"})[
        1:
    ] == [
        "日次  failed",
        "abcd  failed",
    ]


def test_each_time_is_shown_with_its_offset(capsys: pytest.CaptureFixture[str]) -> None:
    local = AT.astimezone(timezone(timedelta(hours=9)))
    assert plain(capsys, {"slot": AT, "local": local})[1:] == [
        "2026-11-25 02:00:00Z  2026-11-25 11:00:00+09:00"
    ]


def test_columns_that_are_empty_throughout_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": "1", "reason": None, "paused": False},
        {"id": "2", "reason": "", "paused": False},
    ]
    assert plain(capsys, *rows) == ["id", "1", "2"]


def test_a_missing_value_is_a_dash_and_a_flag_is_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": "1", "reason": "late", "paused": True},
        {"id": "2", "reason": None, "paused": False},
    ]
    assert plain(capsys, *rows) == ["id  reason  paused", "1   late    yes", "2   -       no"]


def test_a_list_without_rows_has_its_heading(capsys: pytest.CaptureFixture[str]) -> None:
    console.show([], ["id", "task"], as_json=False)
    assert capsys.readouterr().out == "id  task\n"


def test_control_characters_in_a_message_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plain(capsys, {"reason": "one\ntwo\x1b[2J\rthree"})[1:] == ["one two\\x1b[2J\\rthree"]


def test_a_terminal_gets_a_bold_heading(tmp_path: Path) -> None:
    shown = in_terminal(
        tmp_path, [*BATCH, "next", "0 2 * * *", "--after", "2026-11-24T12:00", "-n", "1"], 80
    )
    assert BOLD in shown
    assert without_styles(shown) == [
        "At 02:00 every day",
        "slot                  local",
        "2026-11-25 02:00:00Z  2026-11-25 02:00:00Z",
    ]


def test_text_in_brackets_is_no_markup_in_a_terminal(tmp_path: Path) -> None:
    row = {"id": "1", "reason": "KeyError: [red] and [/]"}
    assert show_in_terminal(tmp_path, [row], ["id", "reason"], 80) == [
        "id  reason",
        "1   KeyError: [red] and [/]",
    ]


def test_only_the_last_column_is_folded_in_a_terminal(tmp_path: Path) -> None:
    row = {"id": "0123456789", "reason": "x" * 25}
    assert show_in_terminal(tmp_path, [row], ["id", "reason"], 32) == [
        "id          reason",
        "0123456789  " + "x" * 20,
        "            " + "x" * 5,
    ]


def test_a_line_wider_than_the_terminal_is_printed_whole(tmp_path: Path) -> None:
    row = {"id": "0123456789" * 4, "task": "a_task_of_a_name", "state": "succeeded"}
    assert show_in_terminal(tmp_path, [row], ["id", "task", "state"], 40) == [
        "id                                        task              state",
        "0123456789012345678901234567890123456789  a_task_of_a_name  succeeded",
    ]


def test_values_stand_after_their_names_and_empty_ones_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.show_values({"id": "1", "next": [AT, "later"], "reason": None, "progress": 0})
    assert capsys.readouterr().out.splitlines() == [
        "id        1",
        "next      2026-11-25 02:00:00Z",
        "          later",
        "progress  0",
    ]


def test_the_lines_of_a_message_are_indented_and_without_control_characters() -> None:
    assert console.message("a\tb\n\x1b[2Jc\r") == "a       b\n    \\x1b[2Jc\\r"


def painted(folder: Path, **settings: str) -> str:
    given = "; ".join(f"os.environ[{name!r}] = {value!r}" for name, value in settings.items())
    code = (
        f"import os; {given or 'pass'}; from batch_system.console import paint; print(paint('bad', "
        "'error'))"
    )
    return in_terminal(folder, [sys.executable, "-c", code], 80)


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    assert painted(tmp_path) == "\x1b[31mbad\x1b[0m\n"
    assert painted(tmp_path, NO_COLOR="1") == "bad\n"
    assert painted(tmp_path, TERM="dumb") == "bad\n"
    assert console.paint("bad", "error") == "bad"
