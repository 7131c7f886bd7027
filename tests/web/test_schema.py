"""The API and its document agree: schemathesis asks a real service what the document allows, and
what it does not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batch_system.operations.asking.actor import ROLES, Role
from tests.processes import batch, service

EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "3"))
TASKS = """
from batch_system import BaseTask

class Hello(BaseTask):
    name, schedule, tags = "hello", "*/5 * * * *", ("demo",)
    async def run(self, n: int = 1, api_key: str = ""):
        return n

class Quick(BaseTask):
    name, schedule = "quick", None
    async def run(self): pass
"""
CONFIG = """
[checks]
# 422 is the answer to what the document can't say, such as parameters that the task does not take.
positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422"]
"""


def check(role: Role, url: str, folder: Path, phases: str) -> None:
    (folder / "tasks" / "some.py").write_text(TASKS)
    (folder / "schemathesis.toml").write_text(CONFIG)
    settings = {
        "DATABASE_URL": url,
        "LEDGER_URL": url if url.startswith("postgresql") else "sqlite:///ledger.db",
        "BATCH_REQUESTS_PER_SECOND": "100000",
        "BATCH_FAILED_SIGN_INS": "100000",
    }
    with service(folder, settings=settings) as served:
        made = batch(folder, "token", "create", role, "--role", role, settings=settings)
        assert made.returncode == 0, made.stderr
        command = [
            *(
                str(Path(sys.executable).with_name("schemathesis")),
                "--config-file",
                "schemathesis.toml",
                "run",
            ),
            *(
                f"{served.url}/api/openapi.json",
                "--header",
                f"Authorization: Bearer {made.stdout.strip()}",
            ),
            *("--max-examples", str(EXAMPLES), "--phases", phases, "--request-timeout", "20"),
            *("--seed", os.environ.get("SCHEMA_SEED", "1")),
            *("--exclude-path", "/api/v1/events"),  # a stream does not end; it has tests of its own
        ]
        asked = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log = served.stderr
    assert asked.returncode == 0, asked.stdout[-8_000:] + asked.stderr[-2_000:]
    tested = re.search(r"Tested: (\d+)", asked.stdout)
    assert tested is not None and int(tested[1]) >= 30, asked.stdout
    assert "Traceback" not in log


# It refuses more values than SQLite does.
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_api_answers_as_its_document_says(database_url: str, tmp_path: Path) -> None:
    check("operator", database_url, tmp_path, "examples,coverage")


@pytest.mark.nightly
@pytest.mark.parametrize("role", ROLES)
def test_the_api_answers_each_role_as_its_document_says(
    role: Role, database_url: str, tmp_path: Path
) -> None:
    check(role, database_url, tmp_path, "examples,coverage,fuzzing")
