"""`batch serve`: uvicorn around the application, and a few calm lines that say what runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys

import uvicorn

from service import logs
from service.app import create_app
from service.batch.scheduler import next_run_times
from service.config import Settings
from service.errors import InvalidSetting
from service.host import BatchService, open_databases


def serve(settings: Settings, host: str | None = None, port: int | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises BatchError when it can't begin."""
    listening = _listen(host or settings.HOST, settings.PORT if port is None else port)
    logs.set_up(settings.LOG_LEVEL, settings.LOG_FORMAT)
    asyncio.run(_check(settings))
    app = create_app()
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on")
    server = _Server(config, listening)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    if not server.started:
        sys.exit(1)


async def _check(settings: Settings) -> None:
    """Find out what is wrong before uvicorn is there to wrap it into a traceback."""
    application, ledger = await open_databases(settings)
    await application.dispose()
    await ledger.dispose()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InvalidSetting(
                f"port {port} on {host} is in use: stop what listens there, or set PORT to another one"
            ) from None
        raise InvalidSetting(f"can't listen on {host} port {port} (HOST, PORT): {error.strerror}") from None
    return listening


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, listening: socket.socket) -> None:
        super().__init__(config)
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            app = self.config.app
            _introduce(app.state.batch, self._listening)  # type: ignore[union-attr]


def _introduce(batch: BatchService, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    lines = [
        f"Batch System on http://{host}:{port}",
        f"  application {batch.application.safe_url}",
        f"  ledger      {batch.ledger.safe_url}",
        f"  {len(batch.tasks)} tasks:" if batch.tasks else "  no tasks yet: drop a file into tasks/",
    ]
    times = next_run_times(batch.scheduler)
    width = max((len(name) for name in batch.tasks), default=0)
    for name in sorted(batch.tasks, key=lambda n: (times.get(n) is None, times.get(n), n)):
        at = times.get(name)
        when = f"next {at:%Y-%m-%d %H:%M:%S} UTC" if at else "by hand, or paused"
        lines.append(f"    {name:<{width}}  {when}")
    lines += [f"  can't be used: {file.source}: {file.error}" for file in batch.broken]
    print("\n".join(lines), flush=True)
