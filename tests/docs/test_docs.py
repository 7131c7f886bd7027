"""The docs describe what exists, and what they say is true: settings, commands, states, code and
its output.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

import batch_system
from batch_system.batch.execution.run_here import ManualRun
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import ledger
from batch_system.batch.nodes.roles import BY_HAND
from batch_system.batch.tasks.base import BaseTask
from batch_system.cli import cli
from batch_system.cli.hints import NO_SERVICE
from batch_system.cli.new import PYTEST_SETTINGS
from batch_system.config import Settings, get_settings
from batch_system.database.companions import companions
from batch_system.server.service import BatchService
from tests import first, preloaded
from tests.docs_blocks import (
    ROOT,
    Block,
    anchors,
    blocks,
    broken_links,
    documentation,
    masked,
    pages,
    read,
    sessions,
)
from tests.docs_pages import PYTEST
from tests.processes import BATCH, environment
from tests.processes import service as running_service

# Settings: .env.example and batch_system/settings say the same.


class Example(NamedTuple):
    value: str
    comment: str


def examples(text: str) -> dict[str, Example]:
    """Each `#NAME=value` with the comment lines right above it."""
    found: dict[str, Example] = {}
    comment: list[str] = []
    for line in text.splitlines():
        if setting := re.fullmatch(r"#([A-Z_]+)=(.*)", line):
            found[setting[1]] = Example(setting[2], " ".join(comment))
            comment = []
        else:
            comment = [*comment, line.removeprefix("# ")] if line.startswith("# ") else []
    return found


def loaded(folder: Path, text: str) -> Settings:
    file = folder / "settings.env"
    file.write_text(text)
    return Settings(_env_file=file)


def test_the_example_has_every_setting_and_no_other() -> None:
    assert list(examples(read(".env.example"))) == list(Settings.model_fields)


@pytest.mark.parametrize("name", Settings.model_fields)
def test_each_setting_in_the_example_has_a_sentence(name: str) -> None:
    comment = examples(read(".env.example"))[name].comment
    assert (
        len(comment.split()) > 3 and comment[0].isupper() and comment.rstrip(")").endswith(".")
    ), comment


def test_the_example_changes_nothing_as_it_is(tmp_path: Path) -> None:
    assert loaded(tmp_path, read(".env.example")).model_dump() == Settings().model_dump()


def test_the_values_in_the_example_are_the_defaults(tmp_path: Path) -> None:
    written = re.sub(r"^#(?=[A-Z_]+=)", "", read(".env.example"), flags=re.MULTILINE)
    assert "\nPORT=" in written
    assert loaded(tmp_path, written).model_dump() == Settings().model_dump()


def test_a_missing_sentence_in_the_example_would_be_seen() -> None:
    found = examples("# One.\n#A=1\n#B=2\n\n# Two.\n\n#C=3\n")
    assert {name: example.comment for name, example in found.items()} == {
        "A": "One.",
        "B": "",
        "C": "",
    }


# Names: what there is stands in the docs.


@cache  # typer takes a tenth of a second for all
def commands() -> dict[str, Any]:
    return commands_of(typer.main.get_command(cli))


def commands_of(group: Any) -> dict[str, Any]:
    return {name: group.get_command(None, name) for name in group.list_commands(None)}


@cache
def options() -> list[tuple[str, str]]:
    return [
        (name, next((o for o in parameter.opts if o.startswith("--")), parameter.opts[0]))
        for name, command in commands().items()
        for parameter in command.params
        if parameter.opts[0].startswith("-") and parameter.name != "help"
    ]


def supported_attributes() -> list[str]:
    hints = [
        name
        for name, value in vars(BaseTask).items()
        if not name.startswith("_") and not callable(value)
    ]
    return sorted({"name", "schedule", *hints})


@pytest.mark.parametrize("name", [*RunState, *Origin])
def test_each_state_and_origin_is_in_the_docs(name: str) -> None:
    assert f"`{name}`" in documentation()


@pytest.mark.parametrize("name", [*ledger.tables, *companions.tables])
def test_each_table_is_in_the_docs(name: str) -> None:
    assert f"`{name}`" in documentation()


def terms() -> list[str]:
    return re.findall(r"^\| (.+?) \| ", read("docs/glossary.md"), re.MULTILINE)[1:]


PLAIN = {
    *("apscheduler", "base", "conditions", "current", "data", "functions", "ids", "json", "keys"),
    *("local", "migration", "numbers", "rows", "sync", "tables", "time"),
}
"""Words in names of modules that mean what they mean everywhere."""


def words_without_a_term(names: Iterable[str]) -> set[str]:
    """The words of these names, such as `missed_ranges`, that are in no term of the glossary and
    not plain.
    """
    known = {_stem(word) for term in terms() for word in re.findall(r"[a-z]+", term.lower())}
    words = {word for name in names for word in re.findall(r"[a-z]+", name)}
    return {word for word in words - PLAIN if _stem(word) not in known}


def _stem(word: str) -> str:
    """`claiming`, `claims` and `claimed` are the term `claim`."""
    return re.sub(r"(?<=...)(ing|ies|y|ed|es|s|e|d)$", "", word)


def test_the_glossary_is_in_alphabetical_order() -> None:
    assert len(terms()) > 50 and terms() == sorted(terms(), key=str.lower)


def test_the_modules_of_batch_and_the_tables_are_named_by_terms_of_the_glossary() -> None:
    modules = [
        path.stem
        for path in (ROOT / "batch_system/batch").glob("*/*.py")
        if path.stem != "__init__"
    ]
    tables = [name.removeprefix("batch_") for name in (*ledger.tables, *companions.tables)]
    assert words_without_a_term([*modules, *tables]) == set()
    assert words_without_a_term(["gossip", "missed_ranges"]) == {"gossip"}


def test_make_test_runs_a_file_of_each_promise() -> None:
    rows = re.findall(r"^\|.*`tests/.*$", read("docs/promises.md"), re.MULTILINE)
    assert len(rows) > 100
    assert [row for row in rows if not any(f"`{file}`" in row for file in first.files())] == []


def test_the_commands_of_ci_are_where_contributors_look() -> None:
    called = re.findall(r"^make \w+$", read(".ci/run"), re.MULTILINE)
    assert "make test" in called
    assert all(f"`{command}`" in read("CONTRIBUTING.md") for command in called)


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_the_readme_can_be_read_in_a_few_minutes(name: str) -> None:
    assert len(read(name).splitlines()) <= 180


def test_the_change_log_has_the_version() -> None:
    version = re.search(r'^version = "(.*)"', read("pyproject.toml"), re.MULTILINE)
    assert version is not None and f"\n## {version[1]} " in read("CHANGELOG.md")


@pytest.mark.parametrize("name", ["README.md", "README.ja.md", "CONTRIBUTING.md", *pages()])
def test_links_lead_somewhere(name: str) -> None:
    assert broken_links(name) == []


def test_a_link_that_leads_nowhere_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "# A heading: (of) `mine`\n[a](#a-heading-of-mine) [b](#b) [c](testing.md) [d](no.md) "
        "[e](testing.md#no)"
    )
    monkeypatch.setattr("tests.docs_blocks.read", lambda name: text)
    monkeypatch.setattr("tests.docs_blocks.anchors", lambda of: anchors(text))
    assert broken_links("docs/index.md") == ["#b", "no.md", "testing.md#no"]


# Blocks: what is shown works.


def readme(language: str) -> list[Block]:
    return [block for block in blocks(read("README.md"), language) if block.is_run]


@pytest.mark.parametrize("name", ["README.md", *pages()])
def test_a_block_that_is_not_run_says_why(name: str) -> None:
    reasons = [block.note for block in blocks(read(name)) if not block.is_run]
    assert all(len(reason.removeprefix("not run: ").split()) > 2 for reason in reasons)


def conftest() -> str:
    """What the README links to, for the tables of its models.py."""
    [code] = [
        block.code
        for block in blocks(read("docs/testing.md"), "python")
        if "def batch_metadata() -> MetaData" in block.code
    ]
    return code.replace("shop.models", "models")


def write_readme(folder: Path) -> None:
    files = {block.file: block.code for block in readme("python")}
    for name, code in {**files, "conftest.py": conftest()}.items():
        assert name is not None
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)


async def test_every_task_of_the_readme_can_be_used_and_runs(tmp_path: Path) -> None:
    write_readme(tmp_path)
    batch = BatchService(get_settings(), BY_HAND)
    await batch.start()
    try:
        assert batch.broken == []
        shown = re.findall(r'^    name = "(\w+)"', read("README.md"), re.MULTILINE)
        assert set(shown) <= {*batch.tasks} and len(shown) == 3
        async with batch.application.engine.begin() as connection:
            await connection.run_sync(sys.modules.pop("models").Base.metadata.create_all)
        for name in shown:
            if name != "report":  # it needs what it has waited for: the test below gives it that
                row = await ManualRun(
                    batch.ledger, batch.engine, batch.tasks[name], batch.node.id
                ).execute({}, None, "a reader")
                assert (row["state"], row["reason"]) == ("succeeded", None)
    finally:
        await batch.stop()


REPORT = """
import pytest
from tasks.customers import ReportTask, WelcomeTask

from batch_system.testing import Batch


@pytest.mark.asyncio
async def test_the_report_runs_after_its_slot(batch: Batch) -> None:
    batch.only(WelcomeTask, ReportTask)
    await batch.advance(days=1)
    assert [run.result for run in batch.runs("report")] == ["0 were welcomed"]
"""


def test_the_test_of_the_readme_passes(tmp_path: Path) -> None:
    write_readme(tmp_path)
    (tmp_path / "pytest.ini").write_text(PYTEST_SETTINGS)
    (tmp_path / "tests/test_report.py").write_text(REPORT)
    printed = call(tmp_path, [*PYTEST, "tests"])
    assert "2 passed" in printed


def call(folder: Path, words: list[str]) -> str:
    done = preloaded.run(words, folder, environment(), within=60, is_one_stream=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def first_steps(tmp_path: Path) -> Path:
    """As after the README's first minute: the tasks of the start, and tasks/hello.py."""
    (hello,) = (block for block in readme("python") if block.file == "tasks/hello.py")
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks", dirs_exist_ok=True)
    (tmp_path / "tasks/hello.py").write_text(hello.code)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "output"),
    [pytest.param(c, o, id=c) for c, o in sessions(readme("console")) if c.startswith("batch ")],
)
def test_a_command_of_the_readme_prints_what_is_shown(
    first_steps: Path, command: str, output: str
) -> None:
    words = re.findall(r'"[^"]*"|\S+', command)[1:]
    printed = call(first_steps, [*BATCH, *(word.strip('"') for word in words)])
    # A reader has started one in another terminal.
    printed = printed.replace(f"batch: {NO_SERVICE}\n", "")
    if "--after" in words:  # then it prints the same at any time
        assert printed == output
    assert masked(printed) == masked(output)


def test_make_serve_prints_what_is_shown(tmp_path: Path) -> None:
    """The order of the tasks is that of their next runs, which differs over the day."""
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks", dirs_exist_ok=True)
    (shown,) = (
        output
        for command, output in sessions(blocks(read("docs/first-task.md"), "console"))
        if command == "make serve"
    )
    with running_service(tmp_path) as started:
        assert sorted(masked(started.stdout)) == sorted(masked(shown))


@pytest.mark.parametrize("name", ["README.md", "README.ja.md", "CONTRIBUTING.md", *pages()])
def test_the_make_targets_that_are_named_are_there(name: str) -> None:
    named = re.findall(r"(?:`|^\$ )make (?:-\w+ \S+ )?([a-z]+)", read(name), re.MULTILINE)
    assert [
        target for target in named if not re.search(rf"^{target}:", read("Makefile"), re.MULTILINE)
    ] == []


# The Japanese README says the same.


def headings(text: str) -> list[str]:
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line.split(" ")[0] for line in re.findall(r"^#+ .*$", without_code, re.MULTILINE)]


def test_the_japanese_readme_has_the_same_code_and_headings() -> None:
    english, japanese = read("README.md"), read("README.ja.md")
    assert [(b.language, b.code) for b in blocks(japanese)] == [
        (b.language, b.code) for b in blocks(english)
    ]
    assert headings(japanese) == headings(english)


def test_the_japanese_readme_has_the_same_names() -> None:
    """The text in backquotes outside of code blocks."""

    def names(text: str) -> set[str]:
        without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        return set(re.findall(r"`([^`\n]+)`", without_code))

    assert names(read("README.ja.md")) == names(read("README.md"))


def test_every_name_for_authors_is_in_the_docs() -> None:
    assert [
        name for name in batch_system.__all__ if not re.search(rf"\b{name}\b", documentation())
    ] == []
