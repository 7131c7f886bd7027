"""`batch --url`: the path of a stranger, from the start of a service to a bulk, from an empty
folder.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.processes import batch, service

TASKS = '''
import asyncio
from batch_system import BaseTask

class Hello(BaseTask):
    """Says hello."""
    name, schedule = "hello", "0 3 * * *"

    async def run(self, n: int = 1):
        if n == 13:
            raise ValueError("unlucky")
        if n == 99:
            await asyncio.Event().wait()
        return n
'''


@pytest.mark.first_start
def test_a_stranger_signs_in_and_works_from_an_empty_folder(tmp_path: Path) -> None:
    home, empty = tmp_path / "home", tmp_path / "empty"
    (home / "tasks").mkdir(parents=True)
    empty.mkdir()
    (home / "tasks" / "hello.py").write_text(TASKS)
    with service(home) as served:
        served.wait_until_said("`batch token create NAME --role admin` makes one")
        first = batch(home, "token", "create", "ann", "--role", "admin").stdout.strip()
        made = httpx.post(
            f"{served.url}/api/v1/tokens",
            headers={"Authorization": f"Bearer {first}"},
            json={"name": "laptop", "role": "operator"},
            trust_env=False,
        )
        (empty / "token").write_text(made.json()["secret"])
        os.chmod(empty / "token", 0o600)

        def ask(*words: str, code: int = 0) -> str:
            done = batch(empty, "--url", served.url, "--token-file", "token", *words)
            assert done.returncode == code, (words, done.stdout, done.stderr)
            return str(done.stdout + (done.stderr if code else ""))

        def asked(*words: str) -> Any:
            return json.loads(ask(*words, "--json"))

        assert [task["name"] for task in asked("tasks")] == ["hello"]
        unlucky = ("run", "hello", "--queue", "--wait", "--param", "n=13")
        assert "unlucky" in ask(*unlucky, code=1)
        [failed] = asked("runs", "--state", "failed")
        assert "ValueError: unlucky" in ask("logs", failed["id"])
        assert "queued again" in ask("retry", "--state", "failed", "--yes")
        [long] = re.findall(r"run (\S+) queued", ask("run", "hello", "--queue", "--param", "n=99"))
        assert asked("cancel", long)["state"] == "cancelled"
        assert "is paused by laptop, until " in ask("pause", "hello", "--for", "2h")
        ask("resume", "hello")
        assert "no clock was ahead" in ask("resume", "--ahead")
        assert "2 got a new run" in ask(
            "backfill", "hello", "--from", "2026-11-01", "--to", "2026-11-03"
        )
        assert {change["actor"] for change in asked("changes", "--action", "run.start")} == {
            "laptop"
        }
        assert "admin" in ask("token", "list", code=2)
        assert "without --url" in ask("migrate", code=2)
        revoked = batch(home, "token", "revoke", "laptop")
        assert revoked.returncode == 0, revoked.stderr
        assert sorted(path.name for path in empty.iterdir()) == ["token"]


@pytest.mark.parametrize("content", ["", "two words", "x" * 300, "\x1b[31m"])
def test_a_file_that_holds_no_token_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    done = batch(tmp_path, "--url", "http://127.0.0.1:9", "--token-file", "token", "tasks")
    assert done.returncode == 2
    assert "--token-file 'token'" in done.stderr
    assert "\x1b" not in done.stderr


def test_a_service_that_does_not_answer_is_exit_code_three(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("bt_1")
    token, warning = ("--token-file", "token"), "the token is sent to 0.0.0.0 readably"
    for url, options, warns in (
        ("http://127.0.0.1:9", token, False),
        ("http://0.0.0.0:9", token, True),
        ("http://0.0.0.0:9", (), False),
    ):
        done = batch(tmp_path, "--url", url, *options, "tasks")
        assert (done.returncode, "can't be reached" in done.stderr) == (3, True)
        assert (warning in done.stderr) == warns
