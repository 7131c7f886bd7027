"""The strip of each page: the nodes with what they do, and the database with how fast it
answers.
"""

from __future__ import annotations

import re
from contextvars import ContextVar

from sqlalchemy import event, update

from batch_system.batch.ledger import tables
from batch_system.operations.system import nodes
from batch_system.pages import live
from batch_system.pages.live import Kind
from tests.pages.conftest import People
from tests.pages.test_run_page import running


def strip_in(html: str) -> str:
    """The text of the nodes in the strip."""
    return re.sub(r"<[^>]+>", "", html.partition('id="nodes">')[2].partition('id="live"')[0])


async def test_the_strip_says_how_busy_a_node_is_and_how_fast_the_database_answers(
    people: People,
) -> None:
    assert re.search(
        r"heartbeat .* ago · lag \d+ ms · 0 of 100 busy",
        strip_in(await people.viewer.page("/runs")),
    )
    await running(people)
    await running(people, task="payroll", state="succeeded")
    strip = strip_in(await people.viewer.page("/changes"))
    assert "1 of 100 busy" in strip
    kind = "PostgreSQL" if people.served.service.ledger.kind == "postgresql" else "SQLite"
    assert re.search(rf"{kind} \d+(\.\d)? ms", strip)
    (part,) = await live._strip(people.served.operations, Kind("nodes", "", "UTC", "", "viewer"))
    assert "1 of 100 busy" in strip_in(f'id="nodes">{part.html}') and kind in part.html


async def test_a_node_of_an_older_version_says_only_how_many_runs_it_executes(
    people: People,
) -> None:
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(update(tables.nodes).values(capacity=None))
    assert "· 0 busy" in strip_in(await people.viewer.page("/nodes"))


async def test_the_strip_is_read_with_one_statement(people: People) -> None:
    statements: list[str] = []
    engine = people.served.service.ledger.reader.sync_engine
    is_asking = ContextVar("is_asking", default=False)
    is_asking.set(True)

    def note(*given: object) -> None:
        if is_asking.get():  # the watch of the service may read the nodes meanwhile
            statements.append(str(given[2]))

    event.listen(engine, "before_cursor_execute", note)
    try:
        await nodes.around(people.served.operations.context)
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert len([each for each in statements if "batch_nodes" in each]) == 1


async def test_the_page_of_nodes_says_how_busy_each_is(people: People) -> None:
    await running(people)
    assert '<td class="num">1 of 100</td>' in await people.viewer.page("/nodes")
