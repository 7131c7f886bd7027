"""The process of a nursery: it has imported the tasks, and forks a child for each run. It has one
thread and no loop.

It waits only for the service, so a slow child holds up nothing here.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from batch_system import failures
from batch_system.batch.context.lease import SharedLease
from batch_system.batch.pools import child_process, frames
from batch_system.batch.pools.nursery_setup import NurserySetup
from batch_system.batch.pools.parent_process import die_with_parent
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.errors import BatchError
from batch_system.settings.reading import get_settings

MOST_DESCRIPTORS = 8
"""The most file descriptors that one message brings."""
THREADS_SECONDS = 1.0
"""How long threads that end may take after the tasks were imported, in seconds."""


def main() -> None:
    """Serve the service at the other end of stdin, which is a socket, until the service closes
    it.
    """
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # the output of imports must not mix with that of the service's command
    Nursery(control).serve()


class Nursery:
    """`control`: the socket to the service."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._frames = frames.Frames()
        self._received: list[int] = []
        """Received file descriptors that no message has taken yet."""
        self._waiting = bytearray()
        """Data that the service has not read yet."""
        self._children: dict[int, int] = {}
        """The process ids of the children that were not reaped, by the number of the run."""

    def serve(self) -> None:
        """Load the tasks, report them to the service, and fork children until the socket ends."""
        setup = self._first_message()
        if setup is None:
            return
        die_with_parent(setup.service)
        ready = self._load(setup)
        self._control.setblocking(False)
        self._send({"ready": ready})
        self._woken, self._waker = _wake_at_ended_children()
        while True:
            writing = [self._control] if self._waiting else []
            readable, writable, _ = select.select([self._control, self._woken], writing, [])
            if writable:
                self._flush()
            if self._woken in readable:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._reap()
            if self._control in readable and not self._receive():
                break
        for child in self._children.values():
            _kill(child)
        os._exit(0)

    def _first_message(self) -> NurserySetup | None:
        while True:
            messages = self._read()
            if messages is None:
                return None
            if messages:
                setup = NurserySetup.from_json(messages[0])
                self._lease = SharedLease(self._received.pop(0)) if setup.has_lease else None
                self._setup = setup
                return setup

    def _load(self, setup: NurserySetup) -> dict[str, Any]:
        """Import the tasks. Returns which of them are here, why the others are not, and the number
        of threads.
        """
        os.chdir(setup.folder)
        sys.path[:] = setup.path
        # The service has already logged the same about these files.
        logging.getLogger().addHandler(logging.NullHandler())
        # If the folder does not exist, each task is imported by its module.
        with suppress(BatchError):
            load_tasks(Path(setup.tasks_dir), shows_tracebacks=False)
        missing: dict[str, str] = {}
        for name, (module, qualname) in setup.tasks.items():
            if name not in TaskRegistry.tasks() and (reason := _register(module, qualname)):
                missing[name] = reason
        # Reads the author's own settings class. If that fails, the child that needs it gets the
        # error.
        with suppress(BatchError):
            get_settings()
        self._database = setup.open_database()
        child_process.prepare()
        gc.collect()
        gc.freeze()
        return {
            "tasks": list(TaskRegistry.tasks()),
            "missing": missing,
            "threads": _threads() if setup.forks else 0,
        }

    def _receive(self) -> bool:
        """Carry out the service's requests. Returns False at the end of the socket."""
        messages = self._read()
        if messages is None:
            return False
        for message in messages:
            if "kill" in message:
                if (child := self._children.get(message["kill"])) is not None:
                    _kill(child)
            else:
                self._begin(message["fork"], self._received.pop(0), self._received.pop(0))
        return True

    def _read(self) -> list[dict[str, Any]] | None:
        data, descriptors, _, _ = socket.recv_fds(self._control, 65_536, MOST_DESCRIPTORS)
        self._received += descriptors
        return self._frames.feed(data) if data else None

    def _begin(self, number: int, connection: int, output: int) -> None:
        if not self._setup.forks:
            self._control.setblocking(True)
            self._send({"forked": number, "pid": os.getpid()})
            self._become(connection, output)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        nursery = os.getpid()
        try:
            child = os.fork()
        except OSError as error:
            self._send({"failed": number, "error": str(error)})
        else:
            if child == 0:
                self._become(connection, output, nursery)
            self._children[number] = child
            self._send({"forked": number, "pid": child})
        os.close(connection)
        os.close(output)

    def _become(self, connection: int, output: int, nursery: int | None = None) -> NoReturn:
        """Become the child of a run, until its end. `nursery`: the nursery's process id, if this
        process was forked from it.
        """
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            if nursery is not None:
                os.setsid()
                die_with_parent(nursery)
            self._control.close()
            self._woken.close()
            self._waker.close()
            for descriptor in self._received:  # those of the next runs
                os.close(descriptor)
            child_process.main(
                socket.socket(fileno=connection), output, self._setup, self._database, self._lease
            )
        finally:
            os._exit(1)

    def _reap(self) -> None:
        """Report the children that have ended, after killing the last processes of their groups."""
        numbers = {child: number for number, child in self._children.items()}
        while numbers:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            child: int = ended.si_pid
            _kill(child)  # until it is reaped, no other process can have its id
            _, status = os.waitpid(child, 0)
            if (number := numbers.pop(child, None)) is not None:
                del self._children[number]
                self._send({"ended": number, "code": os.waitstatus_to_exitcode(status)})

    def _send(self, message: dict[str, Any]) -> None:
        self._waiting += frames.encoded(message)
        self._flush()

    def _flush(self) -> None:
        with suppress(BlockingIOError, BrokenPipeError, ConnectionError):
            while self._waiting:
                del self._waiting[: self._control.send(self._waiting)]


def _register(module: str, qualname: str) -> str | None:
    """Register a task that is in no file of TASKS_DIR. Returns None, or why that is not
    possible.
    """
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
        TaskRegistry.register(found)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an author's module may raise anything
        return f"{module} can't be imported there: {failures.line_of(error)}"
    return None


def _threads() -> int:
    """How many threads this process has, once ending threads are gone; 0 if not known."""
    counted, nothing = 0, threading.Event()
    for _ in range(round(THREADS_SECONDS / 0.01)):
        try:
            counted = len(os.listdir("/proc/self/task"))
        except OSError:
            return 0
        if counted == 1:
            break
        nothing.wait(0.01)
    return counted


def _wake_at_ended_children() -> tuple[socket.socket, socket.socket]:
    """A socket that becomes readable when a child has ended, and the one that is written to
    then.
    """
    woken, waker = socket.socketpair()
    woken.setblocking(False)
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    return woken, waker


def _kill(child: int) -> None:
    """Kill a child that was not reaped yet, and its process group, which may not exist yet."""
    for kill in (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
