"""The lifespan that drives the batch service in your application, and an application of its own around it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from service import logs
from service.config import Settings, get_settings
from service.errors import BatchError
from service.server.batch_service import BatchService
from service.server.shutdown import Stopping
from service.web.api import routes


class App(Protocol):
    """What the lifespan needs of an application, such as Starlette or FastAPI: a `state` to set attributes on."""

    state: Any


@contextlib.asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[None]:
    """Start the batch service with your application and stop it with it. Your logging stays as it is.

    `app.state.scheduler` is the APScheduler, `app.state.batch` the service. Raises BatchError when it can't start.
    """
    settings = get_settings()
    with logs.keep_run_lines(settings.LOG_LEVEL):
        async with serving(BatchService(settings), settings, is_guest=True) as batch:
            _set_state(app, batch)
            yield


@contextlib.asynccontextmanager
async def _lifespan_with_logs(app: Starlette) -> AsyncIterator[None]:
    """The same in our own application. Where it can't start, `app.state.failure` is the reason."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            settings = get_settings()
            logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
            stack.callback(logs.catch_up)
            _set_state(app, await stack.enter_async_context(serving(BatchService(settings), settings, is_guest=False)))
        except BaseException as error:
            app.state.failure = error
            raise
        yield


@contextlib.asynccontextmanager
async def serving(batch: BatchService, settings: Settings, is_guest: bool) -> AsyncIterator[BatchService]:
    """Start `batch`, and stop it at the end of the block or at a signal. `is_guest`: the process is somebody else's."""
    await batch.start()
    stopping = Stopping(batch, settings, is_guest)
    with stopping.watching():
        try:
            yield batch
        finally:
            await stopping.by_server()


def _set_state(app: App, batch: BatchService) -> None:
    app.state.batch = batch
    app.state.scheduler = batch.scheduler


class Application(Starlette):
    """By itself, or mounted in an application whose lifespan enters `lifespan`: then the state is that one's."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, self._short(send))
            return
        if (parent := scope.get("app")) is not None:
            self.state = parent.state
        await super().__call__(scope, receive, send)

    def _short(self, send: Send) -> Send:
        """Says in one line why it can't start, where Starlette says it with a traceback."""

        async def send_short(message: Message) -> None:
            failure = getattr(self.state, "failure", None)
            if message["type"] == "lifespan.startup.failed" and isinstance(failure, BatchError):
                message = {**message, "message": failure.message}
            await send(message)

        return send_short


def create_app() -> Starlette:
    """The service's endpoints as an application, to be served by itself or mounted in yours."""
    return Application(routes=routes, lifespan=_lifespan_with_logs)


app = create_app()
