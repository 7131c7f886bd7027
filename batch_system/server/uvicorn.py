"""`batch serve`: runs the application in uvicorn, and prints a short summary at the start. The API
and the pages are imported after the start.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from batch_system import console, interrupts, logs
from batch_system.concurrency.offload import offload
from batch_system.errors import DatabaseError, InvalidSetting
from batch_system.escaping import echoed
from batch_system.operations.people import access
from batch_system.server.connections import Connections, raise_file_limit, share_of
from batch_system.server.lifespans import lifespan_with_logs
from batch_system.server.service import BatchService
from batch_system.server.starting import (
    collect_garbage_less_often,
    collect_no_garbage_yet,
    print_summary,
)
from batch_system.settings.settings import Settings
from batch_system.web import api
from batch_system.web.access import is_loopback
from batch_system.web.headers import Headed

BACKLOG = 2048
ACCEPTED_AT_ONCE = 16
"""How many connections the event loop accepts in one step, before it counts them."""

IMPORT_AFTER_SECONDS = 0.1
"""The wait between the start and the import of the whole application, because a thread that imports
slows the event loop down.
"""

logger = logs.get_logger("batch_system.batch")
uvicorn_log = logging.getLogger("uvicorn.error")


def serve(settings: Settings, host: str | None = None, port: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT, by default on HOST and PORT. Raises BatchError if the service
    can't start.
    """
    with listen(settings, host, port) as listening:
        serve_on(listening, settings)


def serve_on(listening: socket.socket, settings: Settings) -> None:
    """Serve like `serve`, on a bound socket."""
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    collect_no_garbage_yet()
    app = LateImport()

    async def welcome(batch: BatchService, url: str) -> None:
        print_summary(batch, f" on {url}")
        await offer_sign_in(batch, url, settings)
        app.import_soon()

    run(app, listening, welcome)


Welcome = Callable[[BatchService, str], Awaitable[None]]
"""Called when the server has started, with the service and the URL of the server."""


def run(app: Starlette | LateImport, listening: socket.socket, welcome: Welcome) -> None:
    """Serve this application until SIGTERM or SIGINT.

    Its lifespan sets `app.state.batch`, or the error `app.state.failure`, which is raised here. A
    later error in `app.state.import_error` stops the service, and is raised, too.
    """
    uvicorn_log.setLevel("CRITICAL")
    os.register_at_fork(after_in_child=partial(_close_copy, listening))
    connections = Connections(share_of(raise_file_limit()))
    config = uvicorn.Config(
        app,
        http=connections.protocol(AutoHTTPProtocol),
        ws="none",
        backlog=ACCEPTED_AT_ONCE,
        log_config=None,
        access_log=False,
        # The application itself believes the proxies in BATCH_TRUSTED_PROXIES, and no others
        proxy_headers=False,
        lifespan="on",
    )
    server = _Server(config, listening, welcome)
    with contextlib.suppress(KeyboardInterrupt), interrupts.passed_to(server.handle_exit):
        server.run(sockets=[listening])
    if (error := getattr(app.state, "import_error", None)) is not None:
        raise error


class LateImport:
    """Passes requests to the whole application, which is imported when the service has started.

    Until then it answers health checks, and other requests wait. Importing the API and the pages
    takes half as long as the start of the service, which does not need them: it fires slots and
    executes runs meanwhile. `state` is also that of the whole application.
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
        asyncio.get_running_loop().call_later(IMPORT_AFTER_SECONDS, self.import_whole)

    def import_whole(self) -> asyncio.Task[Starlette]:
        """Begin to import the whole application, once. If that fails, `state.import_error` has the
        error.
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
        gc.freeze()  # exempt the imported objects from garbage collection


def _is_health_check(scope: Scope) -> bool:
    return scope["method"] == "GET" and any(
        scope["path"] == route.path for route in api.health_checks
    )


def _create_app() -> Starlette:
    """Called in a thread, because it takes some tenths of a second."""
    from batch_system.server.app import create_app

    return create_app()


def _close_copy(listening: socket.socket) -> None:
    """Keep a forked child from listening, because it would hold the port if it outlives this
    process.

    /dev/null takes the descriptor, so that it stays in use until the socket's object closes it.
    """
    if listening.fileno() >= 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, listening.fileno(), inheritable=False)
        os.close(null)


def listen(settings: Settings, host: str | None = None, port: int | None = None) -> socket.socket:
    """A socket on `host` and `port` (by default HOST and PORT). Raises InvalidSetting if the
    address can't be used.
    """
    host, port = host or settings.HOST, settings.PORT if port is None else port
    if settings.BATCH_AUTH == "off" and not is_loopback(host):
        raise InvalidSetting(
            "setting BATCH_AUTH: off is only allowed if HOST is a loopback address, and it is "
            f"{echoed(host)}"
        )
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise InvalidSetting(
                f"port {port} on {host} is in use: stop the process that listens there, or change "
                "PORT"
            ) from None
        cause = getattr(error, "strerror", None) or error
        raise InvalidSetting(f"can't listen on {host} port {port} (HOST, PORT): {cause}") from None


class _Server(uvicorn.Server):
    """uvicorn's server without its log lines at start and stop, which a summary replaces."""

    def __init__(self, config: uvicorn.Config, listening: socket.socket, welcome: Welcome) -> None:
        super().__init__(config)
        self._listening = listening
        self._welcome = welcome

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        state = self.config.app.state  # type: ignore[union-attr]
        with contextlib.suppress(SystemExit):  # uvicorn 0.38 only returns
            await super().startup(sockets)
        if self.lifespan.should_exit:
            raise state.failure
        self._listening.listen(BACKLOG)  # the event loop has set its own backlog, ACCEPTED_AT_ONCE
        collect_garbage_less_often()
        uvicorn_log.setLevel("WARNING")
        await self._welcome(state.batch, _url_of(self._listening))

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop. It also stops if the rest of the application can't be imported."""
        state = self.config.app.state  # type: ignore[union-attr]
        return await super().on_tick(counter) or hasattr(state, "import_error")


def _url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def offer_sign_in(batch: BatchService, url: str, settings: Settings) -> None:
    """As long as there is no token, print a link that signs in once, or how to make a token if
    there is no terminal.

    The secret is in the part after the #, so that no server, proxy or log sees it when a browser
    opens the link. The service has started, so it goes on if the ledger can't be read at the
    moment.
    """
    try:
        if settings.BATCH_AUTH == "off" or await access.has_token(batch.operations.context):
            return
        if sys.stderr.isatty() and settings.BATCH_PAGES == "on":
            await _print_link(batch, url)
            _print_more_on_enter(batch, url)
        else:
            console.warn("  no token yet: `batch token create NAME --role admin` makes one")
    except DatabaseError as error:
        console.warn(f"  no link to sign in is offered: {error.message}")


async def _print_link(batch: BatchService, url: str) -> None:
    secret = await access.create_link(batch.operations.context)
    more = ". Enter prints another link" if sys.stdin.isatty() else ""
    console.warn(f"  sign in once, within five minutes: {url}/signin#{secret}{more}")


def _print_more_on_enter(batch: BatchService, url: str) -> None:
    """Print another link when a person presses Enter in the terminal, until there is a token."""
    if not sys.stdin.isatty():
        return
    loop, terminal = asyncio.get_running_loop(), sys.stdin.fileno()
    printing: set[asyncio.Task[None]] = set()

    async def print_another() -> None:
        with contextlib.suppress(DatabaseError):
            if await access.has_token(batch.operations.context):
                loop.remove_reader(terminal)
                console.warn(
                    "  there is a token now: sign in with it, or make another one with `batch "
                    "token create`"
                )
            else:
                await _print_link(batch, url)

    def on_input() -> None:
        if batch.stopping.is_set() or not _may_read(terminal) or not os.read(terminal, 1_000):
            loop.remove_reader(terminal)
        elif not printing:
            printing.add(task := loop.create_task(print_another()))
            task.add_done_callback(printing.discard)

    loop.add_reader(terminal, on_input)


def _may_read(terminal: int) -> bool:
    """Whether terminal input is for this process. In the background of a shell, a read would stop
    it.
    """
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:  # not the controlling terminal of this process
        return True
