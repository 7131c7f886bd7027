"""A real PgBouncer before the tests' server. `python -m tests.pgbouncer` gets one where there is
none.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, make_url

from batch_system.testing.postgres import folder_for_files

NAME = "pgbouncer"
PATHS = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"
"""Debian has it where only root looks."""
PORT = 6432
START_SECONDS = 10.0

# It ends when its standard input does, so also when the tests are killed.
GUARD = '"$0" -q pgbouncer.ini & read -r _; kill -INT $!; wait $!; rm -rf "$PWD"'

INI = """
[databases]
* = {server}
[pgbouncer]
listen_port = {port}
unix_socket_dir = {folder}
logfile = {folder}/log
auth_type = any
max_client_conn = 500
{settings}
"""


def found() -> str | None:
    """The program; None where it is not installed."""
    return shutil.which(NAME, path=PATHS)


@contextmanager
def pooler(url: str, **settings: object) -> Iterator[str]:
    """The URL of the same database through a PgBouncer of its own, in transaction mode.

    `settings`: those of its section [pgbouncer].
    """
    program = found()
    assert program is not None, (
        "this test needs PgBouncer: `make tools` gets it as root on Debian; elsewhere install the "
        "package pgbouncer"
    )
    folder = Path(tempfile.mkdtemp(prefix="batch-pgb-", dir=folder_for_files(fast=True)))
    settings = {"pool_mode": "transaction", **settings}
    lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
    server = _server(make_url(url))
    (folder / "pgbouncer.ini").write_text(
        INI.format(server=server, port=PORT, folder=folder, settings=lines)
    )
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None  # it refuses to run as root
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
    guard = subprocess.Popen(
        ["/bin/sh", "-c", GUARD, program],
        stdin=subprocess.PIPE,
        cwd=folder,
        start_new_session=True,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )
    try:
        _wait_for(folder / f".s.PGSQL.{PORT}", folder / "log")
        place = {"host": str(folder), "port": str(PORT)}
        through = URL.create("postgresql+asyncpg", database=make_url(url).database, query=place)
        yield through.set(username="postgres").render_as_string()
    finally:
        guard.communicate()


def _server(url: URL) -> str:
    """The server of this URL, as PgBouncer's settings name it."""
    place = {"host": url.host, "port": url.port, **url.query}
    login = {"user": url.username, "password": url.password}
    given = {name: value for name, value in (place | login).items() if value is not None}
    return " ".join(f"{name}='{value}'" for name, value in given.items())


def _wait_for(address: Path, log: Path) -> None:
    """Its file is there a moment before it listens, so only a connection tells."""
    give_up_at = time.monotonic() + START_SECONDS
    while not _listens(address):
        said = log.read_text() if log.exists() else ""
        assert time.monotonic() < give_up_at, f"PgBouncer does not listen:\n{said}"
        time.sleep(0.02)


def _listens(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(address)) == 0


def get() -> None:
    """Install the system's package where there is none, and where that can be done."""
    if found() is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=quiet)
        install = ["apt-get", "install", "-qq", "--no-install-recommends", NAME]
        subprocess.run(install, check=True, env=quiet, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    get()
