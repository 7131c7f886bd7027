"""Traces: a real process under `opentelemetry-instrument`, and a real receiver of what it
exports.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from batch_system.batch.ledger import tables
from batch_system.database.engine import Database
from tests.batch.ledger_world import rows, until
from tests.incidents.receivers import HttpReceiver, http_receiver
from tests.processes import ROOT, batch, service
from tests.server.test_serve import make_folder

TASKS = """
import os
from datetime import UTC, datetime

import httpx
from sqlalchemy import text

from batch_system import BaseTask, get_db, start

class Caller(BaseTask):
    name, schedule = "caller", None

    async def run(self) -> None:
        await start(Called, slot=datetime(2026, 3, 1, 3, 5, tzinfo=UTC))

class Called(BaseTask):
    name, schedule, timezone = "called", "5 4 * * *", "Europe/Berlin"

    async def run(self) -> None:
        async with get_db() as session:
            await session.execute(text("SELECT 7"))
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.get(os.environ["SHOP"])

class Broken(BaseTask):
    name, schedule = "broken", None

    def run(self) -> None:
        raise ConnectionError("the shop does not answer")
"""
APP = """
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor

SQLAlchemyInstrumentor().instrument(skip_dep_check=True)

from batch_system.app import app
"""
UVICORN = (sys.executable, "-m", "uvicorn", "traced:app", "--port", "0")


def settings_for(
    folder: Path, ledger: Database, url: str, receiver: HttpReceiver
) -> dict[str, str]:
    collector = receiver.url.removesuffix("/hook")
    return {
        **({"DATABASE_URL": url} if ledger.kind == "postgresql" else {}),
        "LEDGER_URL": url,
        "PYTHONPATH": f"{ROOT}:{folder}",
        "POLL_SECONDS": "0.1",
        "HEARTBEAT_SECONDS": "0.5",
        "SHOP": f"{collector}/shop",
        "OTEL_SERVICE_NAME": "nightly",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }


def spans_of(receiver: HttpReceiver) -> list[Span]:
    spans: list[Span] = []
    for request in receiver.requests:
        if request.path == "/v1/traces":
            resources = ExportTraceServiceRequest.FromString(request.body).resource_spans
            spans.extend(
                span
                for resource in resources
                for scope in resource.scope_spans
                for span in scope.spans
            )
    return spans


def attributes_of(span: Span) -> dict[str, Any]:
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes
    }


@pytest.mark.parametrize(
    "ledger_url", ["postgresql", pytest.param("sqlite", marks=pytest.mark.nightly)], indirect=True
)
async def test_an_attempt_is_a_span_linked_to_who_asked_for_it(
    ledger: Database, ledger_url: str, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path, tasks=TASKS)
    (folder / "traced.py").write_text(APP)
    command = (str(Path(sys.executable).with_name("opentelemetry-instrument")), *UVICORN)
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(http_receiver("200 OK"))
        settings = settings_for(folder, ledger, ledger_url, receiver)
        started = service(folder, command, settings)
        await asyncio.to_thread(started.__enter__)
        stack.push_async_callback(asyncio.to_thread, started.__exit__, None, None, None)
        for task in ("caller", "broken"):
            await asyncio.to_thread(batch, folder, "run", task, "--queue", settings=settings)

        async def by_name() -> dict[str, Span]:
            spans = {span.name: span for span in spans_of(receiver)}
            return spans if {"run caller", "run called", "run broken"} <= spans.keys() else {}

        spans = await until(by_name)
        (node,) = await rows(ledger, tables.nodes, fires=True)

        async def has_beaten_again() -> bool:
            """Between two beats the service has read its ledger five times in the background."""
            (now,) = await rows(ledger, tables.nodes, fires=True)
            return bool(now["beats"] >= node["beats"] + 3)

        await until(has_beaten_again)
        all_spans = spans_of(receiver)

    caller, called_, broken = (spans[f"run {name}"] for name in ("caller", "called", "broken"))
    (run,) = await rows(ledger, task="called", origin="manual")
    assert attributes_of(called_) == {
        "batch.task": "called",
        "batch.run.id": run["id"],
        "batch.attempt": 1,
        "batch.origin": "manual",
        "batch.slot": "2026-03-01T03:05:00+00:00",
        "batch.outcome": "succeeded",
    }
    assert run["traceparent"].startswith(f"00-{caller.trace_id.hex()}-{caller.span_id.hex()}-")
    assert [(link.trace_id, link.span_id) for link in called_.links] == [
        (caller.trace_id, caller.span_id)
    ]
    assert len({span.trace_id for span in (caller, called_, broken)}) == 3
    assert not any(span.parent_span_id for span in (caller, called_, broken))

    assert (broken.status.code, broken.status.message) == (
        Status.STATUS_CODE_ERROR,
        "ConnectionError: the shop does not answer",
    )
    assert called_.status.code == Status.STATUS_CODE_UNSET

    # What the run does is part of its trace: its statements, and the request, with the header.
    inside = [span for span in all_spans if span.trace_id == called_.trace_id and span != called_]
    assert {span.parent_span_id for span in inside} == {called_.span_id}
    assert "SELECT 7" in {attributes_of(span).get("db.statement") for span in inside}
    (shop,) = [request for request in receiver.requests if request.path == "/shop"]
    (request,) = [span for span in inside if span.name == "GET"]
    assert shop.headers["traceparent"].startswith(
        f"00-{request.trace_id.hex()}-{request.span_id.hex()}-"
    )

    # What the service itself does in the background is not.
    runs = {span.trace_id for span in (caller, called_, broken)}
    begun_at = min(span.start_time_unix_nano for span in (caller, broken))
    since = [span for span in all_spans if span.start_time_unix_nano >= begun_at]
    assert [span.name for span in since if span.trace_id not in runs] == []


def test_the_engine_does_not_import_opentelemetry() -> None:
    imported = "[name for name in sys.modules if name.startswith('opentelemetry')]"
    program = f"import sys, batch_system.batch.execution.engine; print({imported})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
