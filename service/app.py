"""The lifespan that drives the batch service in your application, and an application of its own around it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from service import logs
from service.config import Settings, get_settings
from service.errors import BatchError
from service.host import BatchService
from service.web.api import routes

logger = logs.get_logger("service.batch")


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
        async with _serving(app, settings):
            yield


@contextlib.asynccontextmanager
async def _lifespan_with_logs(app: Starlette) -> AsyncIterator[None]:
    """The same in our own application. Where it can't start, `app.state.failure` is the reason."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            settings = get_settings()
            logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
            stack.callback(logs.flush)
            await stack.enter_async_context(_serving(app, settings))
        except BaseException as error:
            app.state.failure = error
            raise
        yield


@contextlib.asynccontextmanager
async def _serving(app: App, settings: Settings) -> AsyncIterator[None]:
    batch = BatchService(settings)
    await batch.start()
    app.state.batch = batch
    app.state.scheduler = batch.scheduler
    stop = _Stop(batch, settings.DRAIN_SECONDS)
    with stop.before_sigterm_kills():
        try:
            yield
        finally:
            await stop.by_server()


class _Stop:
    """Stops the service once: when the server ends the lifespan, or at a SIGTERM that nobody else handles."""

    def __init__(self, batch: BatchService, drain_seconds: float) -> None:
        self._batch = batch
        self._drain_seconds = drain_seconds
        self._work: asyncio.Task[None] | None = None
        self._is_by_server = False

    async def by_server(self) -> None:
        self._is_by_server = True
        await asyncio.shield(self._begun())

    def _begun(self) -> asyncio.Task[None]:
        if self._work is None:
            if running := self._batch.engine.running:
                logger.info(f"Stopping: {running} running, with {self._drain_seconds:g} s to end")
            self._work = asyncio.create_task(self._batch.stop())
        return self._work

    @contextlib.contextmanager
    def before_sigterm_kills(self) -> Iterator[None]:
        """Some servers leave SIGTERM as it is, and send it to workers that drain (hypercorn, when one has ended)."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            yield
            return
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: self._begun().add_done_callback(self._die))
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    def _die(self, _: asyncio.Task[None]) -> None:
        if not self._is_by_server:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)


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
