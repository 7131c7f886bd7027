"""The lifespan that runs the batch service in your application, and an application of ours with the same lifespan."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from service import logs
from service.config import get_settings
from service.errors import BatchError
from service.operations.people.actor import Actor as Actor
from service.operations.people.actor import Role as Role
from service.pages.frame.answers import not_found
from service.pages.routes import routes as pages
from service.server.batch_service import BatchService
from service.server.shutdown import serving
from service.web.access import Authorize, check_settings
from service.web.application import Api


class App(Protocol):
    """An application such as Starlette's or FastAPI's. The lifespan only sets attributes of its `state`."""

    state: Any


@contextlib.asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[None]:
    """Start the batch service with your application, and stop it with it. Your logging is not changed.

    Sets `app.state.batch` (the service) and `app.state.scheduler` (APScheduler). Raises BatchError if the service can't
    start.
    """
    settings = get_settings()
    check_settings(settings)
    with logs.keep_run_lines(settings.LOG_LEVEL):
        async with serving(BatchService(settings), settings, is_guest=True) as batch:
            _set_state(app, batch)
            yield


@contextlib.asynccontextmanager
async def _lifespan_with_logs(app: Starlette) -> AsyncIterator[None]:
    """The lifespan of our own application, with logging. `app.state.failure` is the error if it can't start."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            settings = get_settings()
            check_settings(settings)
            logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
            stack.callback(logs.catch_up)
            batch = BatchService(settings, version=getattr(app.state, "version", None))
            _set_state(app, await stack.enter_async_context(serving(batch, settings, is_guest=False)))
        except BaseException as error:
            app.state.failure = error
            raise
        yield


def _set_state(app: App, batch: BatchService) -> None:
    app.state.batch = batch
    app.state.scheduler = batch.scheduler


class Application(Api):
    """Our application, served by itself or mounted in another one. If mounted it uses that application's state."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, self._with_short_failure(send))
            return
        await super().__call__(scope, receive, send)

    def _with_short_failure(self, send: Send) -> Send:
        """A `send` that reports in one line why the application can't start. Starlette would send a traceback."""

        async def send_short(message: Message) -> None:
            failure = getattr(self.state, "failure", None)
            if message["type"] == "lifespan.startup.failed" and isinstance(failure, BatchError):
                message = {**message, "message": failure.message}
            await send(message)

        return send_short


def create_app(*, authorize: Authorize | None = None, version: str | None = None) -> Starlette:
    """An application with the service's endpoints, to be served by itself or mounted in yours.

    `authorize`: a function, which may be async, from a request to the Actor that makes it, or None for nobody; so the
    users of your application are users of this one. Tokens of the service, and sessions that were begun with them, are
    valid beside it. `version`: of your application, which the audit records; default: the setting BATCH_VERSION.
    """
    app = Application(authorize=authorize, pages=pages, lifespan=_lifespan_with_logs)
    app.add_exception_handler(404, not_found)
    app.state.version = version
    return app


app = create_app()
