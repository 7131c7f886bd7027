"""What CONTRIBUTING.md promises: the hooks do what CI does, and the files that it names are
there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / ".pre-commit-config.yaml"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()

WELL = '"""A file as it should be."""\n'
BADLY = {
    "ruff-check": "import os\n",
    "ruff-format": "x = {'a':1}\n",
    "mypy": 'x: int = "text"\n',
}
"""A file for each hook, which the other two have nothing to say about."""


def hooks() -> list[dict[str, Any]]:
    (only,) = yaml.safe_load(CONFIG.read_text())["repos"]
    assert only["repo"] == "local", "another one would have to be downloaded"
    return only["hooks"]  # type: ignore[no-any-return]


def test_pre_commit_accepts_its_configuration() -> None:
    words = [sys.executable, "-W", "error", "-m", "pre_commit", "validate-config", str(CONFIG)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_hooks_are_what_make_check_runs() -> None:
    """Without the folder, where git hands over the files that are to be committed."""
    recipe = re.search(r"^check: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    checked = [line.strip().removesuffix(" .") for line in recipe[1].splitlines()]
    assert [hook["entry"].replace(" --force-exclude", "") for hook in hooks()] == checked
    assert "make check" in (ROOT / ".ci/run").read_text()
    assert {hook["language"] for hook in hooks()} == {"system"}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with this project's hooks installed, its tools, and next to nothing to check."""
    for name, value in {
        "HOME": str(tmp_path),
        "PRE_COMMIT_HOME": str(tmp_path / "cache"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
        **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "a contributor"),
        **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "contributor@example.com"),
    }.items():
        monkeypatch.setenv(name, value)
    # Set where a hook of git runs the tests.
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "clone"
    (typed,) = (hook["entry"].partition("--strict ")[2] for hook in hooks() if hook["id"] == "mypy")
    for package in typed.split():
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(WELL)
    for path in (CONFIG, ROOT / "pyproject.toml", ROOT / ".gitignore"):
        (folder / path.name).write_text(path.read_text())
    tools = folder / ".venv/bin"
    tools.mkdir(parents=True)
    for tool in ("ruff", "mypy"):
        (tools / tool).symlink_to(Path(sys.executable).parent / tool)
    git(folder, "init", "--quiet")
    call(folder, sys.executable, "-m", "pre_commit", "install")
    return folder


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)


def git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return call(folder, "git", *words)


def failed(output: str) -> list[str]:
    return re.findall(r"^- hook id: (.*)$", output, re.MULTILINE)


def test_a_commit_is_refused_by_the_hook_that_has_a_reason_and_passes_when_it_is_gone(
    clone: Path,
) -> None:
    git(clone, "add", ".")
    for hook, text in BADLY.items():
        (clone / "tasks/new.py").write_text(text)
        git(clone, "add", ".")
        refused = git(clone, "commit", "-m", "New")
        assert refused.returncode != 0 and failed(refused.stdout + refused.stderr) == [hook]
        assert git(clone, "log").returncode != 0, "there is a commit"
    (clone / "tasks/new.py").write_text(WELL)
    git(clone, "add", ".")
    done = git(clone, "commit", "-m", "New")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("Passed") == 3


def test_every_file_that_the_guide_names_is_there() -> None:
    named = re.findall(r"\]\(((?!https?:)[^)]+)\)", GUIDE)
    named += [
        name
        for name in re.findall(r"`([\w./-]+)`", GUIDE)
        if "/" in name and not name.startswith(".venv")
    ]
    assert len(named) > 20 and [name for name in named if not (ROOT / name).exists()] == []
    modules = re.findall(r"`(\w+\.py)`", GUIDE)
    code = ROOT / "batch_system"
    assert len(modules) > 4 and [m for m in modules if not list(code.rglob(m))] == []


def test_every_target_of_make_that_the_guide_names_is_there() -> None:
    targets = set(re.findall(r"(?:`|\$ )(?:\w+=\S+ )?make (?:\w+=\S+ )?(\w+)\b(?!=)", GUIDE))
    assert {"tools", "hooks", "dev", "check", "test", "lock"} <= targets
    assert [
        t
        for t in targets
        if not re.search(rf"^{t}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    ] == []


def test_every_environment_variable_of_the_tests_is_one_that_they_read() -> None:
    named = re.findall(r"`((?:PG|TEST)_\w+)`", GUIDE)
    assert len(named) == 2 and all(
        f'"{name}"' in (ROOT / "batch_system/testing/postgres.py").read_text() for name in named
    )


@pytest.mark.parametrize(
    "most", ["MOST_LINES = 400", "MOST_LINES_OF_STORIES = 700", "MOST_BODY_LINES = 55"]
)
def test_the_sizes_that_the_guide_names_are_those_that_are_checked(most: str) -> None:
    assert most in (ROOT / "tests/test_architecture.py").read_text()
    assert re.search(rf"(?:more than|at most|up to) {most.split()[-1]}\b", GUIDE)
