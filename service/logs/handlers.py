"""Where lines go: structlog over stdlib logging. Inside a run every line carries the run, and is kept for the ledger.

Rendering and writing happen in a thread, so that a slow terminal or pipe never holds up the event loop.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import logging
import logging.handlers
import os
import queue
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from service import escaping
from service.logs import log_lines
from service.logs.mode import RunLog, mode, run_log, stamp_now

MAX_WAITING = 100_000
"""Lines that may wait for a slow stderr."""

MAX_WAITING_BYTES = 64_000_000
"""So many bytes may they be."""

FLUSH_SECONDS = 5.0


class RunLogHandler(logging.Handler):
    """Stamps each record with the time and its run, and hands the line to the run. Knows no database."""

    def emit(self, record: logging.LogRecord) -> None:
        run = run_log.get()
        at = stamp_now()
        record.batch_stamp = (at, run.log_context if run else {})
        log_lines.settle(record)
        if run is not None:
            run.keep_line(at, record.levelname.lower(), record.name, log_lines.text(record))


class _Waiting(queue.SimpleQueue[logging.LogRecord]):
    """Records that wait for the thread that writes, and how many bytes they take. Each sum has one writer."""

    def __init__(self) -> None:
        super().__init__()
        self.added = self.taken = 0

    @property
    def is_full(self) -> bool:
        return self.qsize() >= MAX_WAITING or self.added - self.taken >= MAX_WAITING_BYTES


class _Queue(logging.handlers.QueueHandler):
    """Hands copies of records to the thread that writes; beyond MAX_WAITING it drops them, and says so."""

    queue: _Waiting
    _lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        copied = logging.LogRecord.__new__(logging.LogRecord)  # its constructor looks up what is overwritten here
        vars(copied).update(vars(record))  # the handlers after this one may write on the original
        return copied

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.is_full:
            self._lost += 1
            return
        if self._lost:
            text = f"{self._lost:,} lines were dropped: they came faster than they could be written"
            made = logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
            made.batch_stamp = (record.batch_stamp[0], {})  # type: ignore[attr-defined]
            self._lost = 0
            self._put(made)
        self._put(record)

    def _put(self, record: logging.LogRecord) -> None:
        size = log_lines.size(record)
        record.batch_size = size
        self.queue.added += size
        super().enqueue(record)


class _Writer(logging.handlers.QueueListener):
    """Renders and writes, in a thread of its own. A write that hangs holds no lock that the process needs to end."""

    queue: _Waiting

    def __init__(self, lines: _Waiting, format: str, stream: TextIO) -> None:
        from service.logs import rendering

        super().__init__(lines)
        self._formatter = rendering.formatter(format, colors=stream.isatty())
        self._stream = stream

    def handle(self, record: logging.LogRecord) -> None:
        try:
            text = self._formatter.format(record)
        except Exception as error:  # noqa: BLE001 - the background loop's boundary: the lines after it must be written
            text = escaping.line(f"a line of {record.name} can't be shown: {type(error).__name__}")
        with contextlib.suppress(OSError, ValueError):  # nobody reads, or the stream is closed
            self._write(f"{text}\n")
        self.queue.taken += record.batch_size  # type: ignore[attr-defined]

    def _write(self, text: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except OSError:  # made of memory
            self._stream.write(text)
            return
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(descriptor, data) :]

    def finish(self, seconds: float) -> None:
        """Write what is queued, as far as that goes in so many seconds."""
        self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(seconds)

    def go_on(self) -> None:
        """After `finish`, unless the write hangs."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            self.start()


_writer: _Writer | None = None


def set_up(level: str = "INFO", format: str = "console", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (stderr), as `console` or `json` lines. May be called again."""
    from service.logs import structured

    global _writer
    flush()
    lines = _Waiting()
    _writer = _Writer(lines, format, stream or sys.stderr)
    _writer.start()
    mode.is_set_up = True
    structured.configure()
    root = logging.getLogger()
    root.handlers[:] = [RunLogHandler(), _Queue(lines)]
    root.setLevel(level)
    for chatty in ("apscheduler", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))


@contextlib.contextmanager
def keep_run_lines(level: str = "INFO") -> Iterator[None]:
    """In an application whose logging is its own: keep the lines of runs for the ledger, and change nothing else.

    Lines of get_logger are kept from `level` on; those of other loggers when the application's levels let them through.
    After `set_up` there is nothing to do: its handlers keep them.
    """
    if mode.is_set_up:
        yield
        return
    make = logging.getLogRecordFactory()

    # Not a handler: that would not see loggers that don't propagate, and Python would no longer print warnings by
    # itself where an application has no handler.
    def make_and_keep(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.name and (run := run_log.get()):
            _keep_copy(record, run)
        return record

    logging.setLogRecordFactory(make_and_keep)
    mode.kept_level = logging.getLevelNamesMapping()[level]
    try:
        yield
    finally:
        mode.kept_level = None
        if logging.getLogRecordFactory() is make_and_keep:
            logging.setLogRecordFactory(make)


def _keep_copy(record: logging.LogRecord, run: RunLog) -> None:
    """The application's handlers get the record as it was made."""
    settled = copy.copy(record)
    if isinstance(settled.msg, dict) and "event" in settled.msg:  # of the application's own structlog
        settled._logger = None
    log_lines.settle(settled)
    run.keep_line(stamp_now(), record.levelname.lower(), record.name, log_lines.text(settled))


def flush() -> None:
    """Write what is still queued. Called at exit; after it lines are lost until `set_up` is called again.

    Where nobody reads, the lines are given up after FLUSH_SECONDS.
    """
    global _writer
    if _writer is not None:
        writer, _writer = _writer, None
        writer.finish(FLUSH_SECONDS)


def catch_up() -> None:
    """Write what is still queued, and go on: the end of the service need not be that of the process."""
    if _writer is not None:
        _writer.finish(FLUSH_SECONDS)
        _writer.go_on()


atexit.register(flush)
