"""The page of a task's keys, and what its own page says about its limit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import update

from batch_system import clock
from batch_system.batch.ledger import tables
from tests.pages.conftest import People

MAIL = """
from batch_system import BaseTask, Limit, Rate

class Mail(BaseTask):
    name, schedule = "mail", None
    limit = Limit(lambda tenant: 0, key="tenant", default=0, total=20)
    rate = Rate(60, per=60, key="tenant")
    async def run(self, tenant: str = "nobody"): ...

class Letter(Mail):
    name, tags = "letter", ["secret"]
"""


@pytest.fixture
def of_customers(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "mail.py").write_text(MAIL)


@pytest.mark.rest
async def test_the_page_shows_how_many_runs_of_each_key_wait_and_fail(
    of_customers: None, people: People
) -> None:
    for tenant in ("<b>acme", "<b>acme", "bolt", "core"):
        for task in ("mail", "letter"):
            await people.operator.send(f"/tasks/{task}/start", **{"param-tenant": tenant})
    failed = update(tables.runs).where(tables.runs.c.exclusive == "mail[tenant=core]")
    async with people.served.service.ledger.engine.begin() as connection:
        await connection.execute(
            failed.values(state="failed", fingerprint="f" * 16, finished_at=clock.now())
        )
    html = await people.viewer.page("/tasks/mail/keys")
    words = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "tenant=&lt;b&gt;acme 0 of 0 2" in words and "tenant=core 0 of 0 0 – 1" in words, words
    assert "at most 20 runs of all at once" in html and "begin within 1 min" in html
    html = await people.viewer.page("/tasks/letter/keys")
    assert "acme" not in html and "(hidden)" in html
    html = await people.viewer.page("/tasks/mail")
    assert 'href="/tasks/mail/keys">Keys</a>' in html
    assert "a function says (0 at first) at a time for each value of tenant, 20 in all." in html
    assert "/keys" not in await people.viewer.page("/tasks/report")
    assert "task report has no limit, and so no keys" in await people.viewer.page(
        "/tasks/report/keys", 422
    )
