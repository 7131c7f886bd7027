"""The lifespan that runs the batch service in your application, and that of our own application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.applications import Starlette

from batch_system import logs
from batch_system.server.service import BatchService
from batch_system.server.shutdown import serving
from batch_system.settings.reading import get_settings
from batch_system.web.access import check_settings


class App(Protocol):
    """An application such as Starlette's or FastAPI's. The lifespan only sets attributes of its
    `state`.
    """

    state: Any


@contextlib.asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[None]:
    """Start the batch service with your application, and stop it with it. Your logging is not
    changed.

    Sets `app.state.batch` (the service) and `app.state.scheduler` (APScheduler). Raises BatchError
    if the service can't start.
    """
    settings = get_settings()
    check_settings(settings)
    with logs.keep_run_lines(settings.LOG_LEVEL):
        async with serving(BatchService(settings), settings, is_guest=True) as batch:
            _set_state(app, batch)
            yield


@contextlib.asynccontextmanager
async def lifespan_with_logs(app: Starlette) -> AsyncIterator[None]:
    """The lifespan of our own application, with logging. `app.state.failure` is the error if it
    can't start.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            settings = get_settings()
            check_settings(settings)
            logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
            stack.callback(logs.catch_up)
            batch = BatchService(settings, version=getattr(app.state, "version", None))
            _set_state(
                app, await stack.enter_async_context(serving(batch, settings, is_guest=False))
            )
        except BaseException as error:
            app.state.failure = error
            raise
        yield


def _set_state(app: App, batch: BatchService) -> None:
    app.state.batch = batch
    app.state.scheduler = batch.scheduler
