"""The HTTP endpoints."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from service.batch.scheduler import describe_jobs

READY_SECONDS = 5.0
"""A database that neither answers nor refuses for so long is away."""


async def scheduler_jobs(request: Request) -> JSONResponse:
    """The scheduled jobs: id, name, next_run_time (ISO 8601 or null), trigger."""
    return JSONResponse(describe_jobs(request.app.state.scheduler))


async def healthz(request: Request) -> JSONResponse:
    """200 while the process answers at all."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> JSONResponse:
    """200 when the service can work; 503 and the parts that can't, otherwise."""
    try:
        async with asyncio.timeout(READY_SECONDS):
            wrong = await request.app.state.batch.readiness()
    except TimeoutError:
        wrong = {"databases": f"no answer within {READY_SECONDS:g} s"}
    if wrong:
        return JSONResponse({"status": "not ready", "reasons": wrong}, status_code=503)
    return JSONResponse({"status": "ready"})


routes = [
    Route("/scheduler/jobs", scheduler_jobs),
    Route("/healthz", healthz),
    Route("/readyz", readyz),
]
