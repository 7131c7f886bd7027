"""`batch serve` answers health checks before the API and the pages are imported. Requests for these
wait.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select

from batch_system.batch.ledger import tables
from tests.processes import process
from tests.server.test_serve import BY_HAND, ledger_in, make_folder

SERVE = """
from batch_system.cli import main
sys.argv = ["batch", "serve", "--port", "0"]
main()
"""

LATE = """
import pathlib, sys, time
from batch_system.server import app

create_app = app.create_app

def create_late():
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    return create_app()

app.create_app = create_late
"""

BROKEN = """
import sys

sys.modules["batch_system.server.app"] = None
"""


@pytest.mark.rest
def test_health_checks_are_answered_while_the_rest_is_imported_and_other_requests_wait_for_it(
    tmp_path: Path,
) -> None:
    make_folder(tmp_path, by_hand=BY_HAND)
    with (
        process(tmp_path, (sys.executable, "-c", LATE + SERVE)) as late,
        ThreadPoolExecutor() as threads,
    ):
        late.wait_until_ready()
        early = late.get("/healthz")
        waiting = {
            path: threads.submit(late.get, path)
            for path in ("/api/v1/tasks", "/", "/nowhere", "/metrics")
        }
        posted = threads.submit(httpx.post, late.url + "/healthz", timeout=60, trust_env=False)
        assert late.get("/readyz").json() == {"status": "ready"}
        assert not any(asked.done() for asked in (*waiting.values(), posted))

        (tmp_path / "go").touch()
        answers = {path: asked.result() for path, asked in waiting.items()}
        assert {path: answer.status_code for path, answer in answers.items()} == {
            "/api/v1/tasks": 401,
            "/": 303,
            "/nowhere": 404,
            "/metrics": 200,
        }
        assert posted.result().status_code == 405 and posted.result().json()["kind"] == "invalid"
        whole = late.get("/healthz")
        assert early.json() == whole.json() == {"status": "ok"}
        assert early.headers.keys() == whole.headers.keys()


async def test_a_service_whose_pages_cannot_be_imported_says_so_and_ends(tmp_path: Path) -> None:
    make_folder(tmp_path, by_hand=BY_HAND)
    with process(tmp_path, (sys.executable, "-c", BROKEN + SERVE)) as broken:
        assert broken.process.wait(60) == 1
    assert "the API and the pages can't be imported, so the service ends" in broken.stderr
    assert (
        broken.stderr.rstrip()
        .rpartition("\n")[2]
        .startswith("ModuleNotFoundError: import of batch_system.server.app")
    )
    async with ledger_in(tmp_path) as ledger, ledger.reader.connect() as connection:
        [node] = await connection.execute(select(tables.nodes))
    assert node.stopped_at is not None
