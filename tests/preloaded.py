"""Processes that begin with everything imported: a third of a suite of hundreds of them is spent on
imports otherwise.

One process imports the service and the libraries when it is first asked for another one, and forks
a parent for each worker of a run, which forks for each that is asked for. What comes of it is as
real as any: it has its own folder, environment, output, signals and exit code. Where the first
lines of a process are what is tested, start it with `subprocess`. TESTS_PRELOADED=0 starts each one
from nothing, as `make nightly` does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import pkgutil
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import batch_system

ROOT = str(Path(__file__).parent.parent)
MODULES = ("batch_system", "uvicorn", "pytest", "tests.faults.wrong_clock")
"""What `python -m` may be asked for. There is `python -c` too, and `-W error` before both."""

LIBRARIES = (
    "uvicorn.main",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
)
LIBRARIES += (
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "alembic.command",
)
LIBRARIES += ("apscheduler.schedulers.asyncio", "rich.table", "rich.live", "rich.console", "pytest")
"""What is imported while a process works, and not with the service."""

READ_AT_START = (
    "PYTHONUNBUFFERED",
    "PYTHONIOENCODING",
    "PYTHONUTF8",
    "PYTHONWARNINGS",
    "LC_ALL",
    "LANG",
)
"""What an interpreter reads before its first line: a process that differs in one of them is started
from nothing.
"""

PLACE = "TESTS_PRELOADED_PLACE"
"""The environment variable by which the workers of one run learn the socket of the process that has
everything imported.
"""
LARGEST_MESSAGE = 1_000_000
PR_SET_PDEATHSIG = 1


class Forked:
    """What the tests use of `subprocess.Popen`, of a process whose parent is another one."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self.stdin = None
        self._parent = parent
        self._handle = os.pidfd_open(pid)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            ended = select.poll()
            ended.register(self._handle, select.POLLIN)
            if not ended.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = self._parent.ask({"reap": self.pid})
            os.close(self._handle)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._handle, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that has everything imported, and forks for this one. It ends with this one, and
    so do those that it forked.
    """

    def __init__(self) -> None:
        if PLACE not in os.environ:
            share()
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(os.environ[PLACE])
        atexit.register(self._socket.close)

    def ask(self, message: Mapping[str, Any], files: Sequence[int] = ()) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(files))
            return int(self._socket.recv(100))


_parents: list[_Parent] = []
_making = threading.Lock()


def share() -> None:
    """Let this process, and the workers that it starts from now on, have one that imports for all
    of them. That one ends with this one.
    """
    if not _has_handles():
        return
    folder = tempfile.mkdtemp(prefix="batch-preloaded-")
    ours, theirs = os.pipe()
    os.environ[PLACE] = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(os.environ[PLACE])
        listening.listen()
        importing = subprocess.Popen(
            [sys.executable, "-m", "tests.preloaded", str(listening.fileno()), str(ours)],
            pass_fds=[listening.fileno(), ours],
            env={**os.environ, "PYTHONPATH": ROOT},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    os.close(ours)

    def end() -> None:
        os.close(theirs)
        importing.wait()
        shutil.rmtree(folder)

    atexit.register(end)


def start(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    stdout: IO[bytes],
    stderr: IO[bytes],
) -> subprocess.Popen[bytes] | Forked:
    """A process that is killed when this one ends."""
    if not _is_forked(command, folder, env):
        return subprocess.Popen(
            command,
            cwd=folder,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            preexec_fn=_die_with_the_parent,
        )
    with _making:
        if not _parents:
            _parents.append(_Parent())
    asked = {"words": list(command[1:]), "folder": str(folder), "environment": dict(env)}
    return Forked(_parents[0], _parents[0].ask(asked, [stdout.fileno(), stderr.fileno()]))


def run(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    within: float,
    is_one_stream: bool = False,
) -> subprocess.CompletedProcess[str]:
    """The process to its end, which comes `within` so many seconds, with what it printed. One
    stream: all on stdout.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = start(command, folder, env, stdout, stdout if is_one_stream else stderr)
        try:
            code = started.wait(within)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
            raise
        texts = [
            os.pread(file.fileno(), file.seek(0, os.SEEK_END), 0).decode()
            for file in (stdout, stderr)
        ]
    return subprocess.CompletedProcess(command, code, *texts)


def _is_forked(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> bool:
    if (folder / "batch_system").exists():  # that is what it has to import
        return False
    words = command[3:] if command[1] == "-W" else command[1:]
    is_known = words[0] == "-c" or (words[0] == "-m" and words[1] in MODULES)
    is_same = all(env.get(name) == os.environ.get(name) for name in READ_AT_START)
    is_ours = command[0] == sys.executable and is_same and env.get("PYTHONPATH", ROOT) == ROOT
    return is_known and is_ours and os.environ.get("TESTS_PRELOADED") != "0" and _has_handles()


@functools.cache
def _has_handles() -> bool:
    """Whether the system has handles of processes, which Linux has since 5.3."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def _die_with_the_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _fork_for_each_worker(listening: socket.socket, alive: int) -> socket.socket:
    """Returns in each process that it forks only, with what asks for processes there. Until the
    first one asks nothing is imported.
    """
    events = select.poll()
    events.register(listening, select.POLLIN)
    events.register(alive, select.POLLIN)  # it is closed when the run is over
    is_first = True
    while True:
        if alive in dict(events.poll()):
            # So that what all of them took of the processor counts for this process.
            with contextlib.suppress(ChildProcessError):
                while os.wait():
                    pass
            os._exit(0)
        asked, _ = listening.accept()
        if is_first:
            _import_everything()
            is_first = False
        if os.fork() == 0:
            listening.close()
            os.close(alive)
            return asked
        asked.close()


def _import_everything() -> None:
    for module in pkgutil.walk_packages(batch_system.__path__, "batch_system."):
        if not re.search(r"__main__|migrations|testing|sentry", module.name):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _fork_for_ever(asked: socket.socket) -> list[str]:
    """Returns in each process that it forks only, with what that one shall run."""
    while True:
        text, files, _, _ = socket.recv_fds(asked, LARGEST_MESSAGE, 2)
        if not text:
            os._exit(0)
        message = json.loads(text)
        if "reap" in message:
            asked.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(message["reap"], 0)[1]))
        elif pid := os.fork():
            for file in files:
                os.close(file)
            asked.send(b"%d" % pid)
        else:
            asked.close()
            _become(message, *files)
            return list(message["words"])


def _become(message: dict[str, Any], stdout: int, stderr: int) -> None:
    _die_with_the_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.close(stdout)
    os.close(stderr)
    os.chdir(message["folder"])
    os.environ.clear()
    os.environ.update(message["environment"])
    time.tzset()
    sys.path[0] = message["folder"]


def _forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


def _run(words: list[str]) -> None:
    """As `python WORDS` does."""
    if words[0] == "-W":
        sys.warnoptions.append(words[1])
        warnings.simplefilter(words[1])
        words = words[2:]
    _forget("tests")  # the folder may have a package of that name
    if words[:2] == ["-m", "pytest"]:
        # pytest warns where it can't rewrite the assertions of what has its plugins.
        _forget("batch_system", "anyio")
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *words[2:]]
        program = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(program))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _run(
        _fork_for_ever(
            _fork_for_each_worker(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
        )
    )
