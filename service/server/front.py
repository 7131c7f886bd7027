"""What `batch serve` serves: health checks when the service has started, and the rest when it is
imported too.

Importing the API and the pages takes half as long as the start of the service, which needs nothing
of them: it fires slots and executes runs meanwhile.
"""

from __future__ import annotations

import asyncio
import gc

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from service.concurrency.offload import offload
from service.logs import get_logger
from service.server.lifespans import lifespan_with_logs
from service.web import api
from service.web.headers import Headed

logger = get_logger("service.batch")

MOMENT_SECONDS = 0.1
"""The import begins this long after the start, because a thread that imports slows the event loop
down.
"""


class Front:
    """Passes requests to the whole application. Before that is imported, health checks are answered
    without it.

    Other requests wait for the import. `state` is that of the whole application too.
    """

    def __init__(self) -> None:
        self._early = Starlette(
            routes=api.health_checks,
            lifespan=lifespan_with_logs,
            middleware=[Middleware(Headed, hosts=lambda: None)],
        )
        self.state = self._early.state
        self._whole: Starlette | None = None
        self._import: asyncio.Task[Starlette] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (self._whole is None and _is_health_check(scope)):
            await self._early(scope, receive, send)
        else:
            whole = (
                await asyncio.shield(self.import_whole()) if self._whole is None else self._whole
            )
            await whole(scope, receive, send)

    def import_soon(self) -> None:
        """Begin to import the whole application in a moment, after slots that are due and the first
        health check.
        """
        asyncio.get_running_loop().call_later(MOMENT_SECONDS, self.import_whole)

    def import_whole(self) -> asyncio.Task[Starlette]:
        """Begin to import the whole application, once. If that fails, `state.import_error` says
        why.
        """
        if self._import is None:
            self._import = asyncio.create_task(offload(_create_app))
            self._import.add_done_callback(self._on_imported)
        return self._import

    def _on_imported(self, done: asyncio.Task[Starlette]) -> None:
        if done.cancelled():
            return
        if error := done.exception():
            logger.error(
                "the API and the pages can't be imported, so the service ends", exc_info=error
            )
            self.state.import_error = error
            return
        self._whole = done.result()
        self._whole.state = self.state
        gc.freeze()  # what was imported, which no collection needs to look at


def _is_health_check(scope: Scope) -> bool:
    return scope["method"] == "GET" and any(
        scope["path"] == route.path for route in api.health_checks
    )


def _create_app() -> Starlette:
    """In a thread, because it takes some tenths of a second."""
    from service.server.app import create_app

    return create_app()
