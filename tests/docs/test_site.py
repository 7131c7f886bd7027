"""`make site`: the documents as a site, each page in one of five sections, with links that lead
somewhere, and nothing that a browser would load from elsewhere.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import batch_system
from batch_system import errors
from batch_system.config import Settings
from tests.docs.test_docs import commands, options, supported_attributes
from tests.docs_blocks import ROOT, pages

FOREIGN = re.compile(
    r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


def build(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stderr
    return target


def test_each_page_is_in_the_site_below_one_of_five_sections(site: Path) -> None:
    built = {f"docs/{path.stem}.md" for path in site.glob("*.html")}
    assert {*pages()} <= built
    tabs = re.findall(
        r'class="md-tabs__link">\s*(.*?)\s*</a>', (site / "index.html").read_text(), re.DOTALL
    )
    assert tabs == ["Getting started", "Guides", "Operate", "Reference", "Compare"]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert FOREIGN.search('<script src="https://elsewhere.example/a.js"></script>')
    found = {name: FOREIGN.findall(name.read_text()) for name in site.rglob("*.html")}
    assert {name.name: tags for name, tags in found.items() if tags} == {}
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles) == []


def test_the_file_of_a_block_is_its_title(site: Path) -> None:
    page = (site / "first-task.html").read_text()
    assert '<span class="filename">tasks/greeting.py</span>' in page
    assert "not run:" not in page


@pytest.mark.parametrize("link", ["[nowhere](nowhere.md)", "[nothing](first-task.md#nothing)"])
def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path, link: str) -> None:
    for name in ("docs", "examples", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("mkdocs.yml", "CHANGELOG.md", ".env.example"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs/index.md").open("a") as page:
        page.write(f"\n{link}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and link.split("(")[1].rstrip(")") in done.stderr


def test_the_reference_has_each_command_option_resource_setting_and_error(site: Path) -> None:
    made = {path.stem: path.read_text() for path in (site / "reference").glob("*.html")}
    missing = [
        *(name for name in commands() if f'id="batch-{name}"' not in made["commands"]),
        *(f"{name} {option}" for name, option in options() if not has_option(made, name, option)),
        *(name for name in Settings.model_fields if f"<code>{name}</code>" not in made["settings"]),
        *(name for name, _ in errors_of_the_package() if f">{name}<" not in made["errors"]),
        *(path for path in document()["paths"] if path not in made["api"]),
        *(name for name in batch_system.__all__ if f"batch_system.{name}<" not in made["python"]),
        *(name for name in supported_attributes() if f"  {name}: " not in made["python"]),
    ]
    assert sorted(made) == [
        "api",
        "commands",
        "errors",
        "metrics",
        "python",
        "settings",
    ]
    assert missing == []


def has_option(made: dict[str, str], name: str, option: str) -> bool:
    section = made["commands"].split(f'<h2 id="batch-{name}">')[1].split("<h2 ")[0]
    return f"<code>{option}</code>" in section


def errors_of_the_package() -> list[tuple[str, type[BaseException]]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return [(name, error) for name, error in found if issubclass(error, BaseException)]


def document() -> dict[str, Any]:
    return json.loads((ROOT / "tests/stored/openapi.json").read_text())
