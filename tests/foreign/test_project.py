"""A project of somebody else: its own folder and environment, our wheel, FastAPI, its own models
and Alembic.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from batch_system.config import Settings
from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import PostgresServer
from tests.foreign.places import PLACES, Place
from tests.foreign.test_alembic import PROJECT, names

pytestmark = pytest.mark.nightly  # it installs a wheel, and starts some thirty processes

ROOT = Path(__file__).parent.parent.parent
NEEDED = ("alembic", "fastapi", "psycopg[binary]", "pytest", "pytest-asyncio", "uvicorn")
OWN = ("DATABASE_URL", "ALEMBIC_URL", "SHOP_SCHEMA", "PYTHONPATH", "VIRTUAL_ENV", "FORGETS_US")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment, which has the wheels of this clone, and what the project
    needs beside them.
    """
    folder = tmp_path_factory.mktemp("environment")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    for root in (ROOT, ROOT / "packaging/batch-system"):
        subprocess.run(build, cwd=root, check=True, capture_output=True)
    wheels = map(str, folder.glob("*.whl"))
    locked = (ROOT / "requirements-dev.lock").read_text()
    (folder / "versions.txt").write_text(
        "\n".join(re.findall(r"^\S+==[^\s\\]+(?: ;[^\\\n]+)?", locked, re.MULTILINE))
    )
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pip = [
        str(folder / "venv/bin/python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        str(folder / "versions.txt"),
    ]
    subprocess.run([*pip, *wheels, *NEEDED], check=True)
    return folder / "venv/bin"


@dataclass
class Project:
    """A copy of the project, with tables in `place`."""

    folder: Path
    programs: Path
    place: Place

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in {*Settings.model_fields, *OWN}
        }
        path = {"PATH": f"{self.programs}:{os.environ['PATH']}", "PYTHONPATH": str(self.folder)}
        return {
            **kept,
            **path,
            **self.place.settings,
            "TASKS_DIR": "shop/tasks",
            "POLL_SECONDS": "0.2",
        }

    def run(self, program: str, *words: str, code: int = 0) -> str:
        command = [str(self.programs / program), *words]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, (
            f"{program} {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout + done.stderr


@pytest.fixture(params=PLACES)
def project(
    request: pytest.FixtureRequest, installed: Path, postgres_server: PostgresServer, tmp_path: Path
) -> Iterator[Project]:
    url = wait_for(postgres_server.create_database())
    folder = tmp_path / "project"
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    yield Project(folder, installed, Place.of(request.param, url, tmp_path))
    wait_for(postgres_server.drop_database(url))


def test_the_package_has_neither_tasks_nor_an_application(project: Project) -> None:
    program = "from importlib.util import find_spec as f; print(f('tasks'), f('service').origin)"
    assert project.run("python", "-c", program) == f"None {project.folder}/service/__init__.py\n"


def test_it_starts_works_and_migrates_beside_us(project: Project) -> None:
    url = project.place.settings["DATABASE_URL"]
    project.run("alembic", "upgrade", "head")
    serves(project)
    ours = wait_for(names(url))
    assert not {"users", "sessions", "alembic_version"} & ours and "batch_once" in ours
    assert "succeeded" in project.run("batch", "run", "ship_orders")
    assert "succeeded" in project.run("batch", "run", "backup")
    assert "1 of" not in project.run("batch", "backup", "verify", "latest", "--restore")

    assert "No new upgrade operations" in project.run("alembic", "check")
    project.run("alembic", "revision", "--autogenerate", "-m", "nothing")
    [made] = project.folder.glob("migrations/versions/*_nothing.py")
    functions = [
        node for node in ast.parse(made.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert [ast.unparse(node.body[0]) for node in functions] == ["pass", "pass"]
    made.unlink()

    project.run("alembic", "downgrade", "base")
    assert wait_for(names(url)) == ours - {"batch_orders"}
    project.run("alembic", "upgrade", "head")
    assert project.run("batch", "runs", "--json").count('"succeeded"') == 2
    serves(project)


def serves(project: Project) -> None:
    """The FastAPI application starts with us inside, answers, and ends at SIGTERM."""
    command = [str(project.programs / "uvicorn"), "shop.main:app", "--port", "0"]
    with (
        (project.folder / "uvicorn.txt").open("w+") as told,
        subprocess.Popen(
            command, cwd=project.folder, env=project.environment, stdout=told, stderr=told
        ) as server,
    ):
        try:
            address = until_told(server, project.folder / "uvicorn.txt")
            assert httpx.get(f"{address}/orders", trust_env=False).json() == {"orders": 0}
            assert httpx.get(f"{address}/batch/readyz", trust_env=False).status_code == 200
            server.terminate()
            assert server.wait(30) in (0, -15)
        finally:
            server.kill()


def until_told(server: subprocess.Popen[bytes], file: Path) -> str:
    give_up_at = time.monotonic() + 60
    while not (match := re.search(r"running on (http://\S+)", file.read_text())):
        assert server.poll() is None and time.monotonic() < give_up_at, file.read_text()
        time.sleep(0.1)
    return match[1]


def test_its_tests_have_its_tables_and_ours(
    project: Project, postgres_server: PostgresServer
) -> None:
    databases = ("postgresql",) if project.place.name == "a schema" else ("sqlite", "postgresql")
    project.place.settings["TEST_DATABASE_URL"] = postgres_server.url
    for database in databases:
        assert "2 passed" in project.run("pytest", "-q", f"--batch-database={database}")
    if project.place.name == "a schema":
        told = project.run("pytest", "-q", code=1)
        assert "SQLite has no schemas" in told and "--batch-database=postgresql" in told
