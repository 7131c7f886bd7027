"""What pip installs: the package, and nothing that belongs to a clone. It can be used beside a
package `service` of somebody else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from tests.foreign.test_alembic import PROJECT

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_the_wheel_has_the_package_without_tasks_and_without_the_clones_application(
    wheel: Path,
) -> None:
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names if ".dist-info" not in name.parts[0]} == {
        "batch_system"
    }
    parts = {name.parts[1] for name in names if name.parts[0] == "batch_system"}
    in_clone = {
        path.name for path in (ROOT / "batch_system").iterdir() if path.name != "__pycache__"
    }
    assert parts == in_clone
    migrations = {name.stem.partition("_")[0] for name in names if name.parent.name == "versions"}
    assert migrations == {"data", "ledger"}
    assert PurePosixPath("batch_system/shipped/backup.py") in names


def environment_with(wheel: Path, folder: Path) -> Path:
    """The programs of a new environment, which has the wheel, and the libraries of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = folder.glob("lib/python3*/site-packages")
    # A folder named in a file .pth is searched for modules, but its own files .pth are not read, so
    # this clone is not found.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_a_project_with_a_package_service_of_its_own_runs_its_tests_and_a_task(
    wheel: Path, tmp_path: Path
) -> None:
    programs = environment_with(wheel, tmp_path / "environment")
    folder = tmp_path / "project"
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"TASKS_DIR": "shop/tasks", "PYTHONPATH": str(folder)}
    del environment["BATCH_MIGRATIONS"]

    def run(*words: str) -> str:
        done = subprocess.run(
            [str(programs / words[0]), *words[1:]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    find = "import batch_system, service; print(batch_system.__file__, service.BOX_SIZE)"
    assert run("python", "-c", find).startswith(str(tmp_path / "environment"))
    assert "2 passed" in run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    make = "import shop.models as m, sqlalchemy as s; m.Base.metadata.create_all"
    run("python", "-c", f"{make}(s.create_engine('sqlite:///app.db'))")
    assert "succeeded" in run("batch", "run", "ship_orders")
