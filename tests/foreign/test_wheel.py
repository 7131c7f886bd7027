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

from batch_system import versions
from batch_system.errors import BatchError
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


WITHOUT_WEB = """
import sys

WEB = "fastapi httptools isal jinja2 prometheus_client starlette uvicorn uvloop".split()


class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in WEB:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Missing)
"""
HELLO = """
from batch_system import BaseTask

class Hello(BaseTask):
    name, schedule = "hello", None
    async def run(self) -> str:
        return "hello"
"""


@pytest.mark.rest
def test_without_the_libraries_of_the_web_tasks_run_and_the_others_say_what_to_install(
    wheel: Path, tmp_path: Path
) -> None:
    programs = environment_with(wheel, tmp_path / "environment")
    [packages] = (tmp_path / "environment").glob("lib/python3*/site-packages")
    (packages / "sitecustomize.py").write_text(WITHOUT_WEB)
    (tmp_path / "tasks/hello.py").write_text(HELLO)
    (tmp_path / "tasks/backup.py").write_text(
        "from batch_system.shipped import backup\nclass B(backup.BackupTask): ...\n"
    )

    def run(*words: str) -> tuple[int, str]:
        command = [str(programs / "batch"), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert run("run", "hello")[0] == 0
    needed = {
        ("serve",): "`batch serve` needs uvicorn, which is missing: pip install batch-system\n",
        ("demo",): "`batch demo` needs jinja2, which is missing: pip install batch-system\n",
        ("run", "backup"): "a backup needs isal, which is missing: pip install batch-system\n",
    }
    for words, sentence in needed.items():
        code, said = run(*words)
        assert code != 0 and sentence in said


def test_a_library_that_is_too_old_is_named_before_the_service_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = {"sqlalchemy": "2.0.20"}
    monkeypatch.setattr(versions, "version", lambda name: old.get(name, "9999.1"))
    monkeypatch.setattr(
        versions,
        "requires",
        lambda _: ["sqlalchemy[asyncio]>=2.0.40", "uvicorn>=1; extra == 'web'"],
    )
    with pytest.raises(BatchError) as refused:
        versions.refuse_old_libraries()
    assert refused.value.message == (
        "sqlalchemy is 2.0.20, and batch-system needs sqlalchemy>=2.0.40: "
        "pip install --upgrade 'sqlalchemy>=2.0.40'"
    )
