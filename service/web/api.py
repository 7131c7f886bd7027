"""The HTTP endpoints."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from service.batch.firing.apscheduler import describe_jobs
from service.errors import BatchError

READY_SECONDS = 5.0
"""A database that neither answers nor refuses for so long is away."""


NOT_STARTED = "the batch service is not started: the lifespan of this application must enter service.app.lifespan"


async def scheduler_jobs(request: Request) -> JSONResponse:
    """The scheduled jobs: id, name, next_run_time (ISO 8601 or null), trigger."""
    return JSONResponse(describe_jobs(_started(request, "scheduler")))


async def healthz(request: Request) -> JSONResponse:
    """200 while the process answers at all."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> JSONResponse:
    """200 when the service can work; 503 and the parts that can't, otherwise."""
    try:
        async with asyncio.timeout(READY_SECONDS):
            wrong = await _started(request, "batch").readiness()
    except BatchError as error:
        wrong = {"service": error.message}
    except TimeoutError:
        wrong = {"databases": f"no answer within {READY_SECONDS:g} s"}
    if wrong:
        return JSONResponse({"status": "not ready", "reasons": wrong}, status_code=503)
    return JSONResponse({"status": "ready"})


def _started(request: Request, part: str) -> Any:
    try:
        return getattr(request.app.state, part)
    except AttributeError:
        raise BatchError(NOT_STARTED) from None


routes = [
    Route("/scheduler/jobs", scheduler_jobs),
    Route("/healthz", healthz),
    Route("/readyz", readyz),
]
