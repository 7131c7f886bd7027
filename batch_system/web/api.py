"""The HTTP endpoints for the scheduler's jobs and for health checks."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from batch_system.batch.firing.apscheduler import describe_jobs
from batch_system.concurrency.offload import offload
from batch_system.errors import BatchError
from batch_system.web.access import LOOPBACK, is_address, is_local
from batch_system.web.headers import host_name
from batch_system.web.problems import problem

READY_SECONDS = 5.0
"""A database that does not answer for this long counts as unreachable."""


NOT_STARTED = (
    "the batch service is not started: the lifespan of this application must enter "
    "batch_system.app.lifespan"
)


async def scheduler_jobs(request: Request) -> JSONResponse:
    """A JSON array of the scheduled jobs: id, name, next_run_time (ISO 8601 or null) and trigger.

    On this machine everybody may read it; from elsewhere it needs a token or a sign-in.
    """
    if not is_local(request):
        guard = getattr(request.app, "guard", None)
        if guard is None:  # these routes stand in another application, which knows no tokens
            return problem(
                401,
                "these jobs are shown on this machine only: mount batch_system.app.create_app()",
            )
        await guard.actor(request)
    try:
        return JSONResponse(describe_jobs(_started(request, "scheduler")))
    except BatchError as error:
        return problem(503, error.message)


async def metrics(request: Request) -> Response:
    """The metrics of this process and of the ledger, in the text format of Prometheus.

    On this machine everybody may read them; from elsewhere they need a token of any role.
    """
    guard = getattr(request.app, "guard", None)
    has_own_name = _is_called_by_own_name(request, guard)
    if not (is_local(request) and has_own_name):
        if guard is None:  # these routes stand in another application, which knows no tokens
            detail = (
                "these metrics are shown on this machine only, to who asks localhost or its address"
            )
            return problem(401, f"{detail}: mount batch_system.app.create_app()")
        await guard.actor(request, may_be_anonymous=has_own_name)
    try:
        batch = _started(request, "batch")
    except BatchError as error:
        return problem(503, error.message)
    gauges = await batch.gauges.read()
    content, media_type = await offload(_exposed, batch.snapshot(), gauges, batch.metrics.labels)
    return Response(content, media_type=media_type)


def _exposed(*given: Any) -> tuple[bytes, str]:
    """In a thread, because importing the library takes long, and writing the text takes some
    milliseconds.
    """
    from batch_system.web import exposition

    return exposition.render(*given), exposition.CONTENT_TYPE


def _is_called_by_own_name(request: Request, guard: Any) -> bool:
    """Whether the Host header has an address, or a name that is allowed.

    The path is answered for any Host, because monitors come by address. But requests from an
    attacker's page whose name resolves to this machine also come from here, with that name, and
    must not read anything without a token.
    """
    host = host_name(request.headers.get("host", ""))
    allowed = LOOPBACK if guard is None else guard.hosts
    return allowed is None or host in allowed or host == "localhost" or is_address(host)


async def healthz(request: Request) -> JSONResponse:
    """Answer 200: the process is alive, and can do its work. 503 with the reason if it is about to
    end instead.
    """
    batch = getattr(request.app.state, "batch", None)
    if batch is not None and (failures := batch.supervisor.failures):
        return JSONResponse({"status": "failed", "reasons": failures}, status_code=503)
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> JSONResponse:
    """Answer 200 if the service is ready, otherwise 503 with the reasons by part. `warnings`: what
    holds up runs.
    """
    warnings: dict[str, str] = {}
    try:
        batch = _started(request, "batch")
        warnings = batch.warnings
        async with asyncio.timeout(READY_SECONDS):
            reasons = await batch.readiness()
    except BatchError as error:
        reasons = {"service": error.message}
    except TimeoutError:
        reasons = {"databases": f"no answer within {READY_SECONDS:g} s"}
    more = {"warnings": warnings} if warnings else {}
    if reasons:
        return JSONResponse({"status": "not ready", "reasons": reasons, **more}, status_code=503)
    return JSONResponse({"status": "ready", **more})


def _started(request: Request, part: str) -> Any:
    try:
        return getattr(request.app.state, part)
    except AttributeError:
        raise BatchError(NOT_STARTED) from None


health_checks = [Route("/healthz", healthz), Route("/readyz", readyz)]
of_each_node = [*health_checks, Route("/metrics", metrics)]
"""What each process that has a port answers, also one that fires nothing."""
routes = [Route("/scheduler/jobs", scheduler_jobs), *of_each_node]
