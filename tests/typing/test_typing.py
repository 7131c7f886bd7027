"""What an author writes passes mypy and pyright in their strict modes, and what is a mistake is
refused by both.

It is checked where an author has it: in a folder of its own, with the package installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import batch_system
from tests.docs.test_docs import conftest, readme
from tests.processes import BATCH, ROOT, environment

pytestmark = pytest.mark.types

AUTHORS = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
"""They have the package from where it is installed, and not from beside them."""
HERE = Path(__file__).parent
MARK = re.compile(r"#.*\brefused\b")


class Found(NamedTuple):
    file: str
    line: int
    rule: str
    text: str


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an author's: tasks, their tests, and mistakes; the examples, and the tasks of the
    README.
    """
    folder = tmp_path_factory.mktemp("author") / "project"
    for source, target in (
        (HERE / "sample", ""),
        (HERE / "refused", "refused"),
        (ROOT / "examples", "examples"),
    ):
        shutil.copytree(source, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
    for block in readme("python"):
        assert block.file is not None and not (folder / block.file).exists()
        (folder / block.file).write_text(block.code)
    (folder / "conftest.py").write_text(conftest())
    (folder / ".env").write_text("SETTINGS=app_settings:AppSettings\n")
    return folder


@pytest.fixture(scope="module")
def mypy(project: Path) -> list[Found]:
    cache = project.parent / "mypy"
    words = ["mypy", "--config-file=", f"--cache-dir={cache}", "--strict", "--output=json", "."]
    reports = map(json.loads, printed(project, [sys.executable, "-m", *words]).splitlines())
    return [
        Found(r["file"], r["line"], r["code"], r["message"])
        for r in reports
        if r["severity"] == "error"
    ]


@pytest.fixture(scope="module")
def pyright(project: Path) -> list[Found]:
    """basedpyright in pyright's mode "strict". The rules that it adds are on in its own modes only,
    such as "all".
    """
    (project / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [
        str(Path(sys.executable).with_name("basedpyright")),
        "--pythonpath",
        sys.executable,
        "--outputjson",
    ]
    report = json.loads(printed(project, command))
    assert report["summary"]["filesAnalyzed"] == len(list(project.rglob("*.py")))
    return [
        Found(
            str(Path(each["file"]).relative_to(project)),
            each["range"]["start"]["line"] + 1,
            each.get("rule", ""),
            each["message"],
        )
        for each in report["generalDiagnostics"]
        if each["severity"] != "information"
    ]


def printed(folder: Path, command: list[str]) -> str:
    """Both checkers end with 1 where they found something."""
    done = subprocess.run(
        command, cwd=folder, env=AUTHORS, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=["mypy", "pyright"])
def found(request: pytest.FixtureRequest) -> list[Found]:
    """What a checker reports."""
    reports: list[Found] = request.getfixturevalue(request.param)
    return reports


def test_what_an_author_writes_passes(found: list[Found]) -> None:
    assert [report for report in found if not report.file.startswith("refused/")] == []


@pytest.mark.parametrize("file", sorted(path.name for path in (HERE / "refused").glob("*.py")))
def test_each_mistake_is_refused_where_it_stands(found: list[Found], file: str) -> None:
    lines = (HERE / "refused" / file).read_text().splitlines()
    marked = {number: line.strip() for number, line in enumerate(lines, 1) if MARK.search(line)}
    reports = {report.line: report.text for report in found if report.file == f"refused/{file}"}
    assert {number: text for number, text in reports.items() if number not in marked} == {}
    assert {number: text for number, text in marked.items() if number not in reports} == {}


def test_a_mistake_is_not_refused_for_something_else(pyright: list[Found]) -> None:
    """In strict mode a name that nobody uses is an error too."""
    assert [report for report in pyright if report.rule.startswith("reportUnused")] == []


def test_the_checkers_see_the_package_as_typed(mypy: list[Found], pyright: list[Found]) -> None:
    """Without it mypy takes every name for an Any, and refuses the import."""
    assert (Path(batch_system.__file__).parent / "py.typed").exists()
    assert not any(report.rule.startswith("import") for report in mypy)
    assert not any(report.rule == "reportMissingTypeStubs" for report in pyright)


def test_the_sample_has_no_exemptions() -> None:
    assert [
        path
        for path in HERE.glob("sample/**/*.py")
        if re.search(r"type: ignore|pyright:|cast\(", path.read_text())
    ] == []


def test_what_the_checkers_let_through_works(project: Path) -> None:
    """Every task can be used, and the author's tests pass."""
    tasks = subprocess.run(
        [*BATCH, "tasks", "--json"],
        cwd=project,
        env=AUTHORS,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (tasks.returncode, tasks.stderr) == (0, "")
    options = ["asyncio_mode=auto", "asyncio_default_fixture_loop_scope=function"]
    words = [word for option in options for word in ("-o", option)]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        *words,
        "tests",
    ]
    tests = subprocess.run(
        command, cwd=project, env=AUTHORS, capture_output=True, text=True, timeout=60
    )
    assert tests.returncode == 0, tests.stdout
