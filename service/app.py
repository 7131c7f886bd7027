"""The ASGI application: Starlette's lifespan drives the batch service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from service import logs
from service.config import get_settings
from service.errors import BatchError
from service.host import BatchService
from service.web.api import routes

logger = logs.get_logger("service.batch")


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Start the batch service with the application and stop it with it.

    `app.state.scheduler` is the APScheduler, `app.state.batch` the service. Where it can't start, `app.state.failure`
    is the reason.
    """
    try:
        settings = get_settings()
        logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
        batch = BatchService(settings)
        await batch.start()
    except BaseException as error:
        app.state.failure = error
        raise
    app.state.batch = batch
    app.state.scheduler = batch.scheduler
    try:
        yield
    finally:
        if running := batch.engine.running:
            logger.info(f"Stopping: {running} running, with {settings.DRAIN_SECONDS:g} s to end")
        await batch.stop()
        logs.flush()


class Application(Starlette):
    """Says in one line why it can't start, where Starlette says it with a traceback."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_short(message: Message) -> None:
            failure = getattr(self.state, "failure", None)
            if message["type"] == "lifespan.startup.failed" and isinstance(failure, BatchError):
                message = {**message, "message": failure.message}
            await send(message)

        await super().__call__(scope, receive, send_short if scope["type"] == "lifespan" else send)


def create_app() -> Starlette:
    return Application(routes=routes, lifespan=lifespan)


app = create_app()
