"""The pages of docs/: each describes all of its subject, and its code, commands and statements
work.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import select, text

from batch_system import errors, get_db, start
from batch_system.batch.context.current_run import CurrentRun
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing.misfires import plan_slots
from batch_system.batch.ledger.states import TRANSITIONS, RunState
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.declaration import MISSED, OVERLAP, Missed, Retry
from batch_system.config import Settings, get_settings
from batch_system.database.engine import Database
from batch_system.testing import Batch
from service.application.models import User
from tests.docs.test_docs import commands, commands_of, supported_attributes
from tests.docs_blocks import (
    ELSEWHERE,
    ROOT,
    blocks,
    pages,
    read,
    rows,
    section,
    sessions,
    words_of,
)
from tests.docs_pages import Page
from tests.examples.local_api import LocalAPI
from tests.kinds import KINDS

# The pages of docs/: each has what it is about.


def test_the_index_has_each_page_once() -> None:
    listed = re.findall(r"^\| \[.*?\]\((\w[\w-]*\.md)\)", read("docs/index.md"), re.MULTILINE)
    assert sorted(f"docs/{name}" for name in [*listed, "index.md"]) == pages()


def test_each_setting_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", read("docs/settings.md")))
    others = {"PG_BINDIR", "TEST_DATABASE_URL", "BATCH_POOL_", "BATCH_POOL_CPU"}
    assert named - {*Settings.model_fields} == others


def with_section() -> list[str]:
    return re.findall(r"^## batch (\w+)$", read("docs/cli.md"), re.MULTILINE)


@pytest.mark.parametrize("name", with_section())
def test_the_options_that_the_section_of_a_command_names_are_there(name: str) -> None:
    """`batch NAME --help` lists all of them, and so does the site."""
    named = set(re.findall(r"`(--[\w-]+)", section("docs/cli.md", f"## batch {name}")))
    group = commands()[name]
    those = commands_of(group).values() if hasattr(group, "list_commands") else [group]
    assert named <= {"--help", "--url", "--token-file"} | {
        option for each in those for parameter in each.params for option in parameter.opts
    }


def test_the_sections_of_commands_are_in_the_order_of_the_help() -> None:
    assert with_section() == [name for name in commands() if name in with_section()]


@pytest.mark.parametrize("name", supported_attributes())
def test_each_attribute_has_a_row_with_its_default(name: str) -> None:
    default = getattr(BaseTask, name, None)
    cells = rows(read("docs/policies.md"))[name]
    shown = {"retry": "`Retry()`: one attempt", "missed": '`Missed("once")`'}
    needed = {"name": "needed", "schedule": "needed", "description": "first line of the docstring"}
    expected = {**shown, **needed}.get(
        name, f"`{default}`" if not isinstance(default, str) else f'`"{default}"`'
    )
    assert cells[0] == expected


@pytest.mark.parametrize(
    ("policy", "name"),
    [(policy, field.name) for policy in (Retry(), Missed()) for field in fields(policy)],
)
def test_each_field_of_a_policy_has_a_row_with_its_default(
    policy: Retry | Missed, name: str
) -> None:
    shown = {"on": "`(Exception,)`", "max_age": "one day", "policy": '`"once"`'}
    assert rows(read("docs/policies.md"))[name][0] == shown.get(name, f"`{getattr(policy, name)}`")


@pytest.mark.parametrize(
    "code", re.findall(r"^\| `(Retry\(.*?\))` \|", read("docs/policies.md"), re.MULTILINE)
)
def test_the_waits_of_a_retry_are_as_the_table_has_them(code: str) -> None:
    retry = eval(code, {"Retry": Retry})
    waits = [
        replace(retry, jitter=0).seconds_before(attempt) for attempt in range(2, retry.attempts + 1)
    ]
    cells = [int(cell) for cell in rows(read("docs/policies.md"))[code] if cell]
    assert cells == [*waits, sum(waits)]


def worked_examples() -> list[tuple[str, str, str]]:
    """Each policy of the table of three hours down, what runs, and what is recorded as missed."""
    example = section("docs/policies.md", "## Missed").split("**A worked example.**")[1]
    return [(policy, *cells) for policy, cells in rows(example).items()]


@pytest.mark.parametrize(("code", "runs", "said"), worked_examples())
def test_the_worked_example_is_what_the_policies_do(code: str, runs: str, said: str) -> None:
    policy = eval(code, {"Missed": Missed, "timedelta": timedelta})
    missed = policy if isinstance(policy, Missed) else Missed(policy)
    ten_past = [datetime(2027, 1, 4, hour, 10, tzinfo=UTC) for hour in (9, 12)]
    made = plan_slots(schedule("*/30 * * * *"), *ten_past, missed)
    range_ = (
        made.missed
        and f"{made.missed.first:%H:%M} to {made.missed.last:%H:%M}, {made.missed.count} slots"
    )
    assert (range_ or "nothing") == said
    assert re.findall(r"\d\d:\d\d", runs) == [f"{slot:%H:%M}" for slot in made.catch_up]


@pytest.mark.parametrize("value", [*MISSED, *OVERLAP])
def test_each_policy_value_is_on_the_page(value: str) -> None:
    assert f'`"{value}"`' in read("docs/policies.md")


@pytest.mark.parametrize("state", RunState)
def test_the_page_on_runs_has_the_same_states(state: RunState) -> None:
    assert set(re.findall(r"`(\w+)`", rows(read("docs/runs.md"))[state][1])) == TRANSITIONS[state]


def test_the_errors_that_an_author_may_meet_are_there() -> None:
    """tests/docs/test_site.py looks for all of them in the reference."""
    table = section("docs/runs.md", "## Errors").split("|---|---|\n")[1].split("\n\n")[0]
    named = [
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert len(named) > 10 and [name for name in named if not hasattr(errors, name)] == []


def public(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize(
    "name", sorted(public({*dir(CurrentRun), *(each.name for each in fields(CurrentRun))}))
)
def test_each_thing_that_a_run_knows_of_itself_is_on_a_page(name: str) -> None:
    assert any(row.startswith(name) for row in rows(read("docs/runs.md")))


def test_what_the_service_keeps_about_an_attempt_is_in_one_private_field_of_its_run() -> None:
    assert [each.name for each in fields(CurrentRun) if each.name.startswith("_")] == ["_state"]


def test_the_tests_that_hold_the_promises_are_there() -> None:
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", "".join(map(read, pages()))))
    assert len(named) > 20 and [name for name in sorted(named) if not (ROOT / name).exists()] == []


# Blocks: what is shown works.


@pytest.mark.parametrize("name", [name for name in pages() if name not in ELSEWHERE])
def test_what_a_page_shows_works(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In its order: files are written, scripts and commands run, outputs compared; then tasks and
    tests are run.
    """
    if any(
        block.is_run and block.language in ("python", "console") for block in blocks(read(name))
    ):
        Page(name, tmp_path_factory.mktemp("page")).play()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_code_of_the_other_pages_is_run_by_the_test_that_is_named(name: str) -> None:
    assert name in (ROOT / ELSEWHERE[name]).read_text()
    assert all(block.file or not block.is_run for block in blocks(read(name), "python"))


def batch_commands() -> list[str]:
    everywhere = [
        block for name in ["README.md", *pages()] for block in blocks(read(name), "console")
    ]
    return sorted({command for command, _ in sessions(everywhere) if command.startswith("batch ")})


@pytest.mark.parametrize("command", batch_commands())
def test_a_command_that_is_shown_can_be_typed(command: str) -> None:
    name, *words = words_of(command)
    while name.startswith("--"):  # options of `batch` itself, such as --url
        _, name, *words = words
    commands()[name].make_context(name, words)  # raises at what it does not know


@pytest.fixture
def profiles_task() -> None:
    """The good example of the page on databases."""
    [code] = [
        block.code
        for block in blocks(read("docs/databases.md"))
        if block.file == "tasks/profiles.py"
    ]
    Path("tasks/profiles.py").write_text(code)


async def test_the_good_example_writes_what_the_api_says_and_holds_no_session_meanwhile(
    profiles_task: None, batch: Batch
) -> None:
    async def write_too() -> None:
        async with get_db() as db:
            db.add(User(email=f"new{len(api.requests)}@example.com"))
            await db.commit()

    api = LocalAPI((200, {"email": "ada@example.com"}), meanwhile=write_too)
    await write_too()
    async with api.listening() as url:
        run = await batch.run("profiles", url=url)
    assert (run.state, run.result) == ("succeeded", 1)
    async with get_db(readonly=True) as db:
        assert await db.scalar(select(User.email).where(User.id == 1)) == "ada@example.com"


def statements(page: str) -> dict[str, str]:
    return {
        block.note.removeprefix("sql: "): block.code
        for block in blocks(read(page), "sql")
        if block.is_run
    }


class Flaky(BaseTask):
    name, schedule, retry = "flaky", "0 * * * *", Retry(attempts=2)

    async def run(self) -> str:
        return await start(Asked)


class Asked(BaseTask):
    name, schedule = "asked", None

    async def run(self) -> None: ...


@pytest.fixture
async def ledger_of_a_day(request: pytest.FixtureRequest, batch: Batch) -> AsyncIterator[Database]:
    """With a run of each kind that the statements on the pages look for."""
    batch.add(Flaky, Asked)
    batch.fail_next(Flaky)
    await batch.advance(hours=1)
    await batch.down(hours=3, minutes=5)
    batch.fail_next(Flaky, times=2)
    await batch.run(Flaky)
    await start(Asked)  # queued: nobody settles it
    database = Database(get_settings().ledger_url, setting="LEDGER_URL", pooled=False)
    yield database
    await database.dispose()


@pytest.mark.parametrize("batch_database", KINDS)
async def test_each_query_of_the_page_finds_rows(ledger_of_a_day: Database) -> None:
    queries = {
        name: sql for name, sql in statements("docs/runs.md").items() if sql.startswith("SELECT")
    }
    async with ledger_of_a_day.engine.connect() as connection:
        found = {name: (await connection.execute(text(sql))).all() for name, sql in queries.items()}
    assert len(found) > 3 and [name for name, listed in found.items() if not listed] == []
