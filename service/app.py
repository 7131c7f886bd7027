"""The ASGI application: Starlette's lifespan drives the batch service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette

from service import logs
from service.config import get_settings
from service.host import BatchService
from service.web.api import routes


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Start the batch service with the application and stop it with it.

    `app.state.scheduler` is the APScheduler, `app.state.batch` the service.
    """
    settings = get_settings()
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    batch = BatchService(settings)
    await batch.start()
    app.state.batch = batch
    app.state.scheduler = batch.scheduler
    try:
        yield
    finally:
        await batch.stop()
        logs.flush()


def create_app() -> Starlette:
    return Starlette(routes=routes, lifespan=lifespan)


app = create_app()
