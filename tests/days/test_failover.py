"""A replica is promoted, and the address of the ledger leads to it. The old server is closed, or
stays up read-only.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from batch_system.testing.databases import wait_for
from batch_system.testing.postgres import OwnServer, find_binaries
from tests.days.story import Story
from tests.faults.network import Proxy, proxy

pytestmark = pytest.mark.days


@dataclass
class Replica:
    """A server that follows another one until it is promoted."""

    directory: Path
    binaries: Path

    def promote(self) -> None:
        self._run("pg_ctl", "-D", self.directory / "data", "promote", "-w")

    def _run(self, program: str, *words: object) -> None:
        run_as_owner(self.directory, [self.binaries / program, *words])


def run_as_owner(directory: Path, command: list[object]) -> None:
    """PostgreSQL refuses to run as root: its programs run as the user to whom the folder
    belongs.
    """
    user = pwd.getpwuid(directory.stat().st_uid)
    as_user = (
        {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    )
    subprocess.run(
        [str(word) for word in command],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=directory,
        **as_user,
    )  # type: ignore[call-overload]


@contextmanager
def replica_of(server: OwnServer) -> Iterator[Replica]:
    """A replica in a folder beside that of the server, with a socket of its own."""
    directory = server.directory.with_name(f"{server.directory.name}-b")
    binaries = Path(
        next(Path(f"/proc/{pid}/exe").resolve().parent for pid in postmaster_of(server))
    )
    directory.mkdir(mode=0o700)
    shutil.chown(directory, server.directory.stat().st_uid, server.directory.stat().st_gid)
    replica = Replica(directory, binaries)
    source = ["-h", server.directory, "-p", "5432", "-U", "postgres"]
    run_as_owner(
        directory,
        [binaries / "pg_basebackup", *source, "-D", directory / "data", "-R", "-X", "stream"],
    )
    settings = f"unix_socket_directories = '{directory}'\n"
    with (directory / "data/postgresql.conf").open("a") as file:
        file.write(settings)
    run_as_owner(
        directory,
        [binaries / "pg_ctl", "-D", directory / "data", "-l", directory / "log", "-w", "start"],
    )
    try:
        yield replica
    finally:
        run_as_owner(
            directory,
            [binaries / "pg_ctl", "-D", directory / "data", "-m", "immediate", "-w", "stop"],
        )
        shutil.rmtree(directory)


def postmaster_of(server: OwnServer) -> list[int]:
    return [int((server.directory / "data/postmaster.pid").read_text().split()[0])]


class Cluster:
    """Two nodes that reach the server by an address that can be led to the replica."""

    def __init__(self, folder: Path, server: OwnServer, replica: Replica, network: Proxy) -> None:
        self.server, self.replica, self.network = server, replica, network
        url = make_url(wait_for(server.create_database())).set(
            host="127.0.0.1", port=network.ports[0], query={}
        )
        self.story = Story(
            folder / "story", {"DATABASE_URL": url.render_as_string(hide_password=False)}
        )

    def lead_to_replica(self) -> None:
        self.replica.promote()
        self.network.tell("all", "lead", str(self.replica.directory / ".s.PGSQL.5432"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        # The fast settings have no replication.
        server = stack.enter_context(OwnServer(find_binaries(), fast=False))
        replica = stack.enter_context(replica_of(server))
        network = stack.enter_context(proxy(server.directory, 1))
        made = Cluster(tmp_path, server, replica, network)
        stack.enter_context(made.story)
        made.story.start("a", "b")
        made.story.until(lambda: len(made.story.ended_since(0)) == 12, 30, "all twelve tasks run")
        yield made


def test_the_old_server_is_closed(cluster: Cluster) -> None:
    cluster.story.wait(20)
    cluster.server.stop("immediate")
    cluster.story.wait(15)
    cluster.lead_to_replica()
    cluster.story.check_end()
    cluster.story.check_told()  # no slot was missed


def test_the_old_server_stays_up_and_takes_no_writes(cluster: Cluster) -> None:
    """The connections to it stay open: only its answers to writes tell that another one has taken
    over.
    """
    cluster.story.wait(20)
    where = f"host={cluster.server.directory} port=5432 user=postgres dbname=postgres"
    with psycopg.connect(where, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
    cluster.story.wait(5)
    cluster.replica.promote()
    with psycopg.connect(
        f"host={cluster.replica.directory} port=5432 user=postgres dbname=postgres"
    ) as connection:
        assert connection.execute("SHOW default_transaction_read_only").fetchone() == ("off",)
    cluster.network.tell("all", "lead", str(cluster.replica.directory / ".s.PGSQL.5432"))
    cluster.story.check_end()
    cluster.story.check_told()  # no slot was missed
