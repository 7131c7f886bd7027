"""The HTTP endpoints."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from service.batch.scheduler import describe_jobs


async def scheduler_jobs(request: Request) -> JSONResponse:
    """The scheduled jobs: id, name, next_run_time (ISO 8601 or null), trigger."""
    return JSONResponse(describe_jobs(request.app.state.scheduler))


async def healthz(request: Request) -> JSONResponse:
    """200 while the process answers at all."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> JSONResponse:
    """200 when the service can work; 503 and the parts that can't, otherwise."""
    wrong = await request.app.state.batch.readiness()
    if wrong:
        return JSONResponse({"status": "not ready", "reasons": wrong}, status_code=503)
    return JSONResponse({"status": "ready"})


routes = [
    Route("/scheduler/jobs", scheduler_jobs),
    Route("/healthz", healthz),
    Route("/readyz", readyz),
]
