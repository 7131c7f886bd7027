"""The resources of the API: what they answer, what they change, and what they write to the
audit.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, update

from batch_system import clock
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.people import previews
from batch_system.batch.ledger.people.access_tables import previews as previews_table
from batch_system.batch.ledger.run_query import LOOKED
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import FINAL, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.operations.asking.actor import Actor
from batch_system.operations.backups.backups import Backups
from batch_system.operations.bulks.bulk import _step as step
from batch_system.operations.tasks.details import masked_schema
from batch_system.redaction import Redaction
from batch_system.verbs.bulks import PreviewBulk, ShowBulk
from tests.batch.ledger_world import until
from tests.web.conftest import Served

NOW = datetime(2026, 11, 1, tzinfo=UTC)


async def ended(client: httpx.AsyncClient, run: str) -> dict[str, Any]:
    """The run when it has a final state."""

    async def is_over() -> bool:
        return (await client.get(f"/api/v1/runs/{run}/now")).json()["state"] in FINAL

    await until(is_over)
    answer: dict[str, Any] = (await client.get(f"/api/v1/runs/{run}")).json()
    return answer


async def start(served: Served, **body: Any) -> str:
    answer = await served.operator.post("/api/v1/tasks/report/runs", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def over(number: int, state: RunState, task: str = "report", **columns: Any) -> dict[str, Any]:
    """A row of a run that has ended; the larger the number, the newer it is."""
    at = NOW + timedelta(seconds=number)
    run = NewRun.queued(task, None, at, exclusive=task, priority=0)
    run.state, run.finished_at = state, at
    return {**vars(run), **columns}


async def fill(served: Served, *rows: dict[str, Any]) -> None:
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(insert(tables.runs), list(rows))


@pytest.mark.rest
async def test_tasks_have_schedule_tags_parameters_and_next_slots(served: Served) -> None:
    tasks = {
        task["name"]: task for task in (await served.viewer.get("/api/v1/tasks")).json()["tasks"]
    }
    assert tasks.keys() == {"report", "payroll"}
    assert tasks["report"]["tags"] == ["daily", "money"]
    assert tasks["report"]["schedule"] == "0 3 * * *"
    assert "03:00" in tasks["report"]["words"]
    details = (await served.viewer.get("/api/v1/tasks/report")).json()
    assert details["schema_of_parameters"]["properties"]["day"]["type"] == "string"
    slots = (await served.viewer.get("/api/v1/tasks/report/schedule?n=3")).json()["slots"]
    assert [slot["slot"][11:] for slot in slots] == ["03:00:00Z"] * 3
    unknown = await served.viewer.get("/api/v1/tasks/repotr")
    assert unknown.status_code == 404
    assert "did you mean report?" in unknown.json()["detail"]


@pytest.mark.rest
async def test_a_run_is_started_followed_and_recorded(served: Served) -> None:
    run = await start(served, parameters={"day": "monday", "api_key": "hush"})
    shown = await ended(served.viewer, run)
    assert (shown["state"], shown["result"]) == ("succeeded", {"day": "monday"})
    assert shown["params"] == {"day": "monday", "api_key": "***"}
    event = (await served.viewer.get("/api/v1/changes?action=run.start")).json()["changes"][0]
    assert (event["actor"], event["role"], event["source"], event["run"]) == (
        "operator",
        "operator",
        "api",
        run,
    )
    assert event["after"]["params"] == {"day": "monday", "api_key": "***"}


async def test_the_same_idempotency_key_starts_one_run(served: Served) -> None:
    answers = [
        await served.operator.post(
            "/api/v1/tasks/report/runs", json={}, headers={"Idempotency-Key": "month 11"}
        )
        for _ in range(3)
    ]
    assert len({answer.json()["id"] for answer in answers}) == 1


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"parameters": {"nope": 1}}, 422, "there is no parameter"),
        ({"parameters": {"day": [1]}}, 422, "day is"),
        ({"slot": "2026-11-27T03:00:00"}, 400, "offset"),
        ({"slot": 0}, 400, "offset"),
        ({"slot": "9999-12-31T23:00:00Z"}, 422, "years 1901 to 8999"),
        ({"other": 1}, 400, "other"),
    ],
)
async def test_a_start_that_is_not_right_is_refused_and_nothing_is_written(
    served: Served, body: dict[str, Any], status: int, text: str
) -> None:
    answer = await served.operator.post("/api/v1/tasks/report/runs", json=body)
    assert answer.status_code == status
    assert text in answer.json()["detail"]
    assert (await served.viewer.get("/api/v1/runs")).json()["runs"] == []


async def test_a_value_of_a_secret_parameter_is_not_told_in_an_error(served: Served) -> None:
    answer = await served.operator.post(
        "/api/v1/tasks/report/runs", json={"parameters": {"api_key": ["hush"]}}
    )
    assert answer.status_code == 422
    assert "hush" not in answer.text
    # Nor of a task that only others have loaded.
    async with served.service.ledger.engine.begin() as connection:
        schema = {
            "type": "object",
            "properties": {"api_key": {"type": "integer"}, "login": {"type": "integer"}},
        }
        row = {
            "name": "elsewhere",
            "description": "",
            "source": "there.py",
            "policies": {},
            "parameters": schema,
        }
        await connection.execute(
            insert(tables.tasks).values(**row, first_seen_at=NOW, last_seen_at=NOW)
        )
    for secret in ({"api_key": "hush"}, {"login": {"password": "hush"}}):
        answer = await served.operator.post(
            "/api/v1/tasks/elsewhere/runs", json={"parameters": secret}
        )
        assert answer.status_code == 422 and "has a value that is not allowed" in answer.text
        assert "hush" not in answer.text


async def test_a_task_that_only_another_process_has_loaded_can_be_started(served: Served) -> None:
    async with served.service.ledger.engine.begin() as connection:
        schema = {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "additionalProperties": False,
        }
        row = {
            "name": "elsewhere",
            "description": "",
            "source": "there.py",
            "policies": {"priority": 7},
        }
        times = {"first_seen_at": NOW, "last_seen_at": NOW}
        await connection.execute(insert(tables.tasks).values(**row, **times, parameters=schema))
    wrong = await served.operator.post(
        "/api/v1/tasks/elsewhere/runs", json={"parameters": {"n": "many"}}
    )
    assert wrong.status_code == 422
    assert "it takes n" in wrong.json()["detail"]
    deep = json.loads("[" * 65 + "]" * 65)
    wrong = await served.operator.post(
        "/api/v1/tasks/elsewhere/runs", json={"parameters": {"n": deep}}
    )
    assert (wrong.status_code, "n: lists and objects may be nested on 64 levels" in wrong.text) == (
        422,
        True,
    )
    answer = await served.operator.post(
        "/api/v1/tasks/elsewhere/runs", json={"parameters": {"n": "3"}}
    )
    run = (await served.viewer.get(f"/api/v1/runs/{answer.json()['id']}/now")).json()
    assert (run["state"], run["params"], run["priority"], run["exclusive"]) == (
        "queued",
        {"n": 3},
        7,
        "elsewhere",
    )


async def test_a_viewer_sees_no_parameters_results_and_logs_of_a_secret_task(
    served: Served,
) -> None:
    answer = await served.operator.post(
        "/api/v1/tasks/payroll/runs", json={"parameters": {"month": 5}}
    )
    run = answer.json()["id"]
    shown = await ended(served.operator, run)
    assert (shown["params"], shown["result"]) == ({"month": 5}, {"paid": 5})
    hidden = (await served.viewer.get(f"/api/v1/runs/{run}")).json()
    assert (hidden["params"], hidden["result"], hidden["log"]) == (None, None, [])
    assert (await served.viewer.get(f"/api/v1/runs/{run}/log")).status_code == 403
    assert (await served.operator.get(f"/api/v1/runs/{run}/log")).status_code == 200


@pytest.mark.rest
async def test_lists_are_filtered_and_paged_to_the_last_run(served: Served) -> None:
    states = [RunState.FAILED, RunState.SUCCEEDED, RunState.CANCELLED]
    await fill(
        served,
        *(
            over(number, states[number % 3], ("report", "payroll")[number % 2])
            for number in range(60)
        ),
    )

    async def listed(**query: Any) -> list[int]:
        numbers, after = [], None
        while True:
            page = (
                await served.viewer.get(
                    "/api/v1/runs", params={**query, **({"after": after} if after else {})}
                )
            ).json()
            numbers += [
                round((datetime.fromisoformat(r["created_at"]) - NOW).total_seconds())
                for r in page["runs"]
            ]
            after = page["after"]
            if after is None:
                return numbers

    assert await listed(limit=7) == [*range(59, -1, -1)]
    assert await listed(limit=7, state="failed") == [n for n in range(59, -1, -1) if n % 3 == 0]
    assert await listed(limit=7, state=["failed", "cancelled"]) == [
        n for n in range(59, -1, -1) if n % 3 != 1
    ]
    assert await listed(limit=7, state=["failed", "succeeded"]) == [
        n for n in range(59, -1, -1) if n % 3 != 2
    ]
    every = "&".join(f"state={state}" for state in RunState)
    for path in ("/api/v1/runs", "/api/v1/tasks/report/runs"):
        assert (await served.viewer.get(f"{path}?{every}")).status_code == 200
    assert await listed(limit=7, task="report", state="failed") == [
        n for n in range(59, -1, -1) if n % 6 == 0
    ]
    assert await listed(limit=7, tag="money") == [n for n in range(59, -1, -1) if n % 2 == 0]
    assert await listed(tag="unknown") == []
    since = (NOW + timedelta(seconds=50)).isoformat()
    assert await listed(limit=7, created_since=since) == [*range(59, 49, -1)]
    assert await listed(limit=7, created_until=since) == [*range(49, -1, -1)]
    assert await listed(limit=7, ended_since=since, state="failed") == [57, 54, 51]
    assert await listed(origin="backfill") == []


@pytest.mark.rest
async def test_runs_are_found_by_a_parameter_and_by_the_text_of_an_error(served: Served) -> None:
    values: list[Any] = ["monday", 3, "3", True, None, 'a"b', "100%"]
    await fill(
        served, *(over(n, RunState.FAILED, params={"day": value}) for n, value in enumerate(values))
    )
    await fill(
        served,
        over(10, RunState.FAILED, reason="ValueError: 100% wrong_1"),
        over(11, RunState.FAILED, reason="x"),
    )

    async def found(**query: str) -> list[int]:
        page = (await served.viewer.get("/api/v1/runs", params={"task": "report", **query})).json()
        return [
            round((datetime.fromisoformat(run["created_at"]) - NOW).total_seconds())
            for run in page["runs"]
        ]

    assert await found(param="day=monday") == [0]
    assert await found(param="day=3") == [2, 1]
    assert await found(param="day=true") == [3]
    assert await found(param='day=a"b') == [5]
    assert await found(param="day=100%") == [6]
    assert await found(param="other=1") == []
    assert await found(text="100% WRONG_1") == [10]
    assert await found(text="100_") == []


@pytest.mark.rest
async def test_a_page_looks_at_a_bounded_number_of_rows_and_says_where_it_stopped(
    served: Served,
) -> None:
    await fill(served, over(0, RunState.FAILED, reason="the one"))
    await fill(served, *(over(n, RunState.FAILED, reason="another") for n in range(1, LOOKED + 5)))
    first = (await served.viewer.get("/api/v1/runs?task=report&text=the+one")).json()
    assert (first["runs"], first["after"] is None) == ([], False)
    second = (
        await served.viewer.get(f"/api/v1/runs?task=report&text=the+one&after={first['after']}")
    ).json()
    assert [run["reason"] for run in second["runs"]] == ["the one"]
    assert second["after"] is None


@pytest.mark.rest
@pytest.mark.parametrize("after", ["x", "1_2", "-1_01a21d92-eff2-7bb2-a544-63212a7a4a49", "9" * 40])
async def test_a_cursor_that_no_page_gave_is_refused(served: Served, after: str) -> None:
    for path in ("/runs", "/changes", "/tasks/report/runs"):
        assert (
            await served.viewer.get(f"/api/v1{path}", params={"after": after})
        ).status_code == 400
    assert (await served.viewer.get("/api/v1/runs", params={"limit": 10**9})).status_code == 400


@pytest.mark.rest
async def test_the_log_is_paged_filtered_and_given_as_text(served: Served) -> None:
    run = await start(served, parameters={"day": "never"})
    await ended(served.viewer, run)
    page = (await served.viewer.get(f"/api/v1/runs/{run}/log")).json()
    assert page["is_end"] and "there is no such day" in page["lines"][-1]["text"]
    rest = (await served.viewer.get(f"/api/v1/runs/{run}/log?after={page['after']}")).json()
    assert rest["lines"] == []
    one = (await served.viewer.get(f"/api/v1/runs/{run}/log?limit=1")).json()
    assert len(one["lines"]) == 1
    assert (await served.viewer.get(f"/api/v1/runs/{run}/log?level=CRITICAL")).json()["lines"] == []
    assert (await served.viewer.get(f"/api/v1/runs/{run}/log?q=NO+SUCH+day")).json()["lines"] != []
    text = await served.viewer.get(f"/api/v1/runs/{run}/log", headers={"Accept": "text/plain"})
    assert text.headers["content-type"].startswith("text/plain")
    assert "there is no such day" in text.text
    odd = await start(served, parameters={"day": "odd"})
    await ended(served.viewer, odd)
    text = await served.viewer.get(f"/api/v1/runs/{odd}/log", headers={"Accept": "text/plain"})
    assert r"odd \x1b[31m\u202eday" in text.text
    assert not {"\x1b", "\u202e"} & set(text.text)


@pytest.mark.rest
async def test_a_cancel_and_a_retry_with_notes_are_in_the_audit(served: Served) -> None:
    run = await start(served, parameters={"day": "never"})
    await ended(served.viewer, run)
    refused = await served.operator.post(f"/api/v1/runs/{run}/cancel", json={})
    assert refused.status_code == 409
    retried = await served.operator.post(
        f"/api/v1/runs/{run[-8:]}/retry", json={"note": "after the fix"}
    )
    assert retried.status_code == 200, retried.text
    event = (await served.viewer.get("/api/v1/changes?action=run.retry")).json()["changes"][0]
    assert (event["run"], event["note"], event["before"]["state"]) == (
        run,
        "after the fix",
        "failed",
    )


@pytest.mark.rest
async def test_a_bulk_changes_the_runs_of_its_preview_and_no_others(served: Served) -> None:
    await served.operator.post("/api/v1/tasks/report/pause")
    failed = [over(number, RunState.FAILED) for number in range(2_500)]
    await fill(served, *failed, over(5_000, RunState.SUCCEEDED))
    body = {"action": "retry", "filter": {"task": "report", "state": ["failed"]}}
    preview = (await served.operator.post("/api/v1/runs/bulk", json=body)).json()
    assert (preview["count"], preview["first"]["id"]) == (2_500, failed[-1]["id"])
    await fill(served, over(6_000, RunState.FAILED))
    async with served.service.ledger.engine.begin() as connection:
        changed = update(tables.runs).where(tables.runs.c.id == failed[0]["id"])
        await connection.execute(changed.values(state=RunState.SUCCEEDED))
    begun = await served.operator.post(
        f"/api/v1/runs/bulk/{preview['id']}", json={"note": "all of them"}
    )
    assert begun.status_code == 202

    async def is_over() -> bool:
        return (await served.viewer.get(f"/api/v1/runs/bulk/{preview['id']}")).json()[
            "finished_at"
        ] is not None

    await until(is_over)
    bulk = (await served.operator.get(f"/api/v1/runs/bulk/{preview['id']}")).json()
    assert (bulk["position"], bulk["changed"], bulk["note"]) == (2_500, 2_499, "all of them")
    assert (await served.viewer.get(f"/api/v1/runs/bulk/{preview['id']}")).json()["note"] is None, (
        "a task is secret"
    )
    again = await served.operator.post(f"/api/v1/runs/bulk/{preview['id']}")
    assert again.status_code == 409
    left = (await served.viewer.get("/api/v1/runs?state=failed")).json()["runs"]
    assert len(left) == 1
    cancel = (
        await served.operator.post(
            "/api/v1/runs/bulk", json={"action": "cancel", "filter": {"task": "report"}}
        )
    ).json()
    assert cancel["count"] == 2_499


@pytest.mark.rest
async def test_a_bulk_goes_on_in_another_process_after_the_first_one_died(served: Served) -> None:
    await served.operator.post("/api/v1/tasks/report/pause")
    await fill(served, *(over(number, RunState.FAILED) for number in range(2_500)))
    operations = served.operations.by(Actor("ann"))
    preview = await operations(PreviewBulk(action="retry", filter=_filter(state=["failed"])))
    async with served.service.ledger.engine.begin() as connection:
        assert await previews.begin(connection, preview.id, {"name": "ann"}, None, clock.now())
    # The process dies after one transaction.
    assert await step(operations.context, operations.context.node, preview.id)
    assert (await operations(ShowBulk(preview=preview.id))).position == 1_000
    served.service._wake_bulks()

    async def is_over() -> bool:
        return (await operations(ShowBulk(preview=preview.id))).finished_at is not None

    await until(is_over)
    assert (await operations(ShowBulk(preview=preview.id))).changed == 2_500


def _filter(**conditions: Any) -> Any:
    from batch_system.operations.asking.filter import RunFilter

    return RunFilter.of(**conditions)


async def test_an_old_preview_and_that_of_another_kind_are_refused(served: Served) -> None:
    body = {"action": "retry", "filter": {}}
    preview = (await served.operator.post("/api/v1/runs/bulk", json=body)).json()
    other = await served.operator.post(
        "/api/v1/tasks/report/backfill", json={"preview": preview["id"]}
    )
    assert other.status_code == 404
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(
            update(previews_table).values(expires_at=clock.now() - timedelta(seconds=1))
        )
    old = await served.operator.post(f"/api/v1/runs/bulk/{preview['id']}")
    assert old.status_code == 404
    assert "expired" in old.json()["detail"]
    assert (await served.operator.post(f"/api/v1/runs/bulk/{new_id()}")).status_code == 404


async def test_a_backfill_needs_its_preview_and_the_same_schedule(served: Served) -> None:
    body = {"since": "2026-11-01T00:00:00Z", "until": "2026-11-05T00:00:00Z"}
    preview = (
        await served.operator.post("/api/v1/tasks/report/backfill/preview", json=body)
    ).json()
    assert preview["count"] == 4
    assert (await served.viewer.get("/api/v1/runs")).json()["runs"] == []
    begun = await served.operator.post(
        "/api/v1/tasks/report/backfill", json={"preview": preview["id"]}
    )
    assert begun.status_code == 202, begun.text

    async def has_runs() -> bool:
        runs = (await served.viewer.get("/api/v1/tasks/report/runs")).json()["runs"]
        return [run["state"] for run in runs] == ["succeeded"] * 4

    await until(has_runs)
    runs = (await served.viewer.get("/api/v1/tasks/report/runs")).json()["runs"]
    assert [run["slot"][:10] for run in runs] == [f"2026-11-0{day}" for day in (4, 3, 2, 1)]
    second = (
        await served.operator.post(
            "/api/v1/tasks/report/backfill/preview", json={**body, "redo": True}
        )
    ).json()
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(update(tables.schedules).values(valid_until=clock.now()))
    refused = await served.operator.post(
        "/api/v1/tasks/report/backfill", json={"preview": second["id"]}
    )
    assert refused.status_code == 409
    assert "schedule" in refused.json()["detail"]


@pytest.mark.rest
async def test_the_status_says_what_is_wrong(served: Served) -> None:
    status = (await served.viewer.get("/api/v1/status")).json()
    assert (status["ok"], status["troubles"]) == (True, [])
    assert [node["application"] for node in status["nodes"]] == ["app 1"]
    run = await start(served, parameters={"day": "never"})
    await ended(served.viewer, run)
    status = (await served.viewer.get("/api/v1/status")).json()
    assert [trouble["kind"] for trouble in status["troubles"]] == ["failed"]
    known = await served.operator.post(
        f"/api/v1/runs/{run}/acknowledge", json={"note": "there is no such day"}
    )
    assert known.status_code == 200, known.text
    assert (await served.viewer.get("/api/v1/status")).json()["ok"]


@pytest.mark.rest
async def test_the_audit_has_the_start_of_the_service_and_is_paged(served: Served) -> None:
    events, after = [], None
    while True:
        query = {"limit": 1, **({"after": after} if after else {})}
        answer = await served.viewer.get("/api/v1/changes", params=query)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        events += page["changes"]
        after = page["after"]
        if after is None:
            break
    assert sorted(event["action"] for event in events) == ["service.start", *["token.create"] * 3]
    start_event = next(event for event in events if event["action"] == "service.start")
    assert start_event["after"]["versions"]["application"] == "app 1"
    assert "hush" not in str(events)


async def test_backups_are_listed_and_verified_without_a_path(served: Served) -> None:
    made = await Backups(served.operations.context).create()
    name = made.path.rsplit("/", 1)[-1]
    listed = (await served.viewer.get("/api/v1/backups")).json()
    assert [backup["name"] for backup in listed["backups"]] == [name]
    verified = await served.operator.post(f"/api/v1/backups/{name}/verify")
    assert verified.status_code == 200, verified.text
    assert (
        str(served.service.settings.BACKUP_DIR.resolve()) not in listed.__repr__() + verified.text
    )
    assert (await served.operator.post("/api/v1/backups/..%2Fsecret/verify")).status_code in (
        400,
        404,
    )
    assert (await served.operator.post("/api/v1/backups/unknown/verify")).status_code == 404


async def test_only_backups_of_the_list_are_found_and_no_error_says_where_they_are(
    served: Served, tmp_path: Path
) -> None:
    made = Path((await Backups(served.operations.context).create()).path)
    elsewhere = tmp_path / "other files"
    elsewhere.mkdir()
    served.service.settings.BACKUP_URL = f"file://{elsewhere}"
    (tmp_path / "notes").write_text("not a backup")
    shutil.copy(made, tmp_path / "backup_20200101_000000.backup.gz")  # the working directory
    damaged, data = made.with_name("backup_20200102_000000.backup.gz"), made.read_bytes()
    damaged.write_bytes(data[:-100] + bytes(100))
    shutil.copy(damaged, elsewhere / "backup_20200103_000000.backup.gz")
    said = ""
    for name, status in (
        ("notes", 404),
        ("backup_20200101_000000.backup.gz", 404),
        (damaged.name, 500),
        ("backup_20200103_000000.backup.gz", 500),
    ):
        for method, path in (("POST", "/verify"), ("GET", ""), ("GET", "/diff"), ("POST", "/pin")):
            answer = await served.admin.request(method, f"/api/v1/backups/{name}{path}")
            assert answer.status_code == status or (status == 500 and answer.status_code == 200), (
                answer.text
            )
            said += answer.text
    said += (await served.viewer.get("/api/v1/backups")).text
    assert damaged.name in said
    assert "damaged" in said
    assert not [word for word in (str(tmp_path), "other files", "file:", "/backup") if word in said]


@pytest.mark.rest
async def test_the_document_says_what_an_event_is_and_what_is_refused(served: Served) -> None:
    document = (await served.nobody.get("/api/openapi.json")).json()
    answer = document["paths"]["/api/v1/events"]["get"]["responses"]["200"]
    event = answer["content"]["text/event-stream"]["schema"]
    assert (event["type"], set(event["properties"])) == ("object", {"id", "event", "data"})
    assert (
        "31 days"
        in document["components"]["schemas"]["MuteTask"]["properties"]["until"]["description"]
    )
    incident = "/incidents/01a21d92-eff2-7bb2-a544-63212a7a4a49/acknowledge"
    interval = {"since": "2026-11-01T00:00:00Z", "until": "2026-11-02T00:00:00Z"}
    for note in ("   ", " a ", "a\0b"):
        for path, body in (
            (incident, {}),
            ("/runs/latest/acknowledge", {}),
            ("/slots/leave", interval),
        ):
            refused = await served.operator.post(f"/api/v1{path}", json={**body, "note": note})
            assert refused.status_code == 400, (
                "it is said by the document, so it is no mistake of a user"
            )


@pytest.mark.rest
async def test_large_parameters_are_cut_where_many_changes_are_listed(served: Served) -> None:
    run = await start(served, parameters={"day": "x" * 900_000})
    shown = (await served.viewer.get(f"/api/v1/runs/{run}")).json()
    assert len(shown["params"]["day"]) == 900_000
    for path in ("/changes?action=run.start", "/night"):
        answer = await served.viewer.get(f"/api/v1{path}")
        assert len(answer.content) < 10_000
        [change] = [
            each
            for each in answer.json()["changes"]
            if "run.start" in (each.get("action"), each.get("kind"))
        ]
        assert change["after"]["params"].startswith('{"day": "xxx')
        assert "characters)" in change["after"]["params"]


async def test_tokens_are_made_listed_and_revoked(served: Served) -> None:
    made = (
        await served.admin.post(
            "/api/v1/tokens", json={"name": "ci", "role": "viewer", "expires_in_days": 7}
        )
    ).json()
    again = await served.admin.post("/api/v1/tokens", json={"name": "ci", "role": "viewer"})
    assert again.status_code == 409
    listed = (await served.admin.get("/api/v1/tokens")).json()["tokens"]
    assert {token["name"] for token in listed} == {"ci", "viewer", "operator", "admin"}
    assert made["secret"] not in str(listed)
    assert (await served.admin.delete("/api/v1/tokens/ci")).json()["revoked_by"] == "admin"
    assert (await served.admin.delete("/api/v1/tokens/ci")).status_code == 404
    assert (
        await served.admin.post("/api/v1/tokens", json={"name": "ci", "role": "viewer"})
    ).status_code == 201


@pytest.mark.rest
async def test_a_viewer_learns_nothing_of_what_a_secret_task_works_on(served: Served) -> None:
    wrong = await served.operator.post(
        "/api/v1/tasks/payroll/runs", json={"parameters": {"month": 77}}
    )
    run = wrong.json()["id"]
    await ended(served.operator, run)
    failing = {
        "reason": "ValueError: DE-4711 is wrong",
        "state": RunState.FAILED,
        "params": {"month": "DE-4711"},
        "key": "DE-4711",
        "fingerprint": "1:0",
    }
    async with served.service.ledger.engine.begin() as connection:
        await connection.execute(update(tables.runs).where(tables.runs.c.id == run).values(failing))
        attempt = {"type": "ValueError", "message": "DE-4711 is wrong", "traceback": "DE-4711"}
        await connection.execute(update(tables.attempts).values(error=attempt))
    paths = [
        *(
            "/runs",
            f"/runs/{run}",
            f"/runs/{run}/now",
            f"/runs/{run}/attempts",
            f"/runs/{run}/quarantine",
        ),
        *(
            "/tasks/payroll",
            "/tasks/payroll/runs?order=created",
            "/changes",
            "/status",
            "/quarantine",
        ),
    ]
    for path in paths:
        answer = await served.viewer.get(f"/api/v1{path}")
        assert answer.status_code == 200, (path, answer.text)
        assert "DE-4711" not in answer.text and '"month":77' not in answer.text, path
    assert "DE-4711" in (await served.operator.get(f"/api/v1/runs/{run}")).text
    day = {"created_since": "2026-01-01T00:00:00Z"}
    for query in (
        {"param": "month=DE-4711"},
        {"text": "DE-4711"},
        {"fingerprint": "1:0"},
        {"fingerprint": "1:0", "task": "payroll"},
    ):
        assert (await served.viewer.get("/api/v1/runs", params={**query, **day})).json()[
            "runs"
        ] == []
        assert (
            len((await served.operator.get("/api/v1/runs", params={**query, **day})).json()["runs"])
            == 1
        )


async def test_defaults_with_a_secret_name_are_masked(served: Served) -> None:
    """A run by schedule works with them."""
    report = (await served.admin.get("/api/v1/tasks/report")).json()
    assert [each["default"] for each in report["parameters"]] == ["'today'", "'***'"]


def test_defaults_within_parameters_are_masked_by_their_names() -> None:
    account = {
        "properties": {
            "password": {"type": "string", "default": "hush"},
            "day": {"default": "today"},
        }
    }
    schema = {
        "$defs": {"Account": account},
        "anyOf": [account],
        "properties": {"to": {"default": {"token": "hush"}}},
    }
    shown = masked_schema(schema, Redaction.of("password,token"))
    assert "hush" not in str(shown) and str(shown).count("today") == 2
    assert schema["$defs"]["Account"]["properties"]["password"]["default"] == "hush", (
        "the schema of the task is its own"
    )


@pytest.mark.rest
async def test_runs_are_not_found_by_a_value_that_is_masked(served: Served) -> None:
    answer = await served.admin.get("/api/v1/runs", params={"param": "api_key=hush"})
    assert answer.status_code == 422
    assert "hush" not in answer.text
    body = {"action": "retry", "filter": {"param": ["api_key=hush"]}}
    assert (await served.operator.post("/api/v1/runs/bulk", json=body)).status_code == 422
    assert "hush" not in (await served.admin.get("/api/v1/changes")).text


@pytest.mark.rest
async def test_a_backfill_of_centuries_is_refused_before_its_slots_are_counted(
    served: Served,
) -> None:
    async with served.service.ledger.engine.begin() as connection:
        often = update(tables.schedules).where(tables.schedules.c.task == "report")
        await connection.execute(often.values(cron="* * * * *"))
    body = {"since": "0001-01-01T00:00:00Z", "until": "2026-11-01T00:00:00Z", "many": True}
    answer = await served.operator.post("/api/v1/tasks/report/backfill/preview", json=body)
    assert answer.status_code == 422
    assert "more than 100,000 slots" in answer.json()["detail"]


@pytest.mark.rest
async def test_an_answer_about_the_night_that_the_caller_has_is_not_sent_again(
    served: Served,
) -> None:
    first = await served.viewer.get("/api/v1/night?zone=Europe/Berlin")
    assert (first.status_code, first.json()["zone"], first.json()["level"]) == (
        200,
        "Europe/Berlin",
        "calm",
    )
    again = await served.viewer.get(
        "/api/v1/night?zone=Europe/Berlin", headers={"If-None-Match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert (await served.viewer.get("/api/v1/night?zone=Mars/Base")).status_code == 422


async def test_an_incident_is_acknowledged_with_a_note_and_a_task_is_muted(served: Served) -> None:
    await served.operator.post("/api/v1/tasks/report/runs", json={"parameters": {"day": "never"}})

    async def opened() -> Any:
        return (await served.viewer.get("/api/v1/incidents")).json()["incidents"]

    (incident,) = await until(opened)
    assert (incident["kind"], incident["task"], incident["text"]) == (
        "failed",
        "report",
        "ValueError: there is no such day",
    )
    url = f"/api/v1/incidents/{incident['id']}"
    assert (await served.operator.post(f"{url}/acknowledge", json={"note": "x"})).status_code == 400
    done = (await served.operator.post(f"{url}/acknowledge", json={"note": "we know it"})).json()
    assert (done["runs"], done["incident"]["closed_why"], done["incident"]["note"]) == (
        1,
        "acknowledged",
        "we know it",
    )
    assert (await served.operator.post(f"{url}/reopen")).json()["closed_at"] is None
    until_then = (clock.now() + timedelta(hours=2)).isoformat()
    muted = await served.operator.post(
        "/api/v1/tasks/report/mute", json={"until": until_then, "note": "upgrade"}
    )
    assert (muted.status_code, muted.json()["by"]) == (200, "operator")
    assert (await served.operator.post("/api/v1/tasks/report/unmute")).json() == {"was_muted": True}
