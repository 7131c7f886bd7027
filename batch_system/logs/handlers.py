"""Logs: structlog over stdlib logging. Within a run, each line has the run's context and is kept
for the ledger.

A thread renders and writes the lines, so that a slow terminal or pipe never blocks the event loop.
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
from functools import cached_property
from typing import Any, TextIO

from batch_system import escaping
from batch_system.logs import log_lines
from batch_system.logs.mode import TOLD_AT, RunLog, mode, run_log, stamp_now

MAX_WAITING = 100_000
"""The most lines that wait for a slow stderr."""

MAX_WAITING_BYTES = 64_000_000
"""The most bytes of lines that wait for a slow stderr."""

FLUSH_SECONDS = 5.0


class RunLogHandler(logging.Handler):
    """Adds the time and the context of the run to each record, and passes the line to the run. Uses
    no database.
    """

    def emit(self, record: logging.LogRecord) -> None:
        run = run_log.get()
        at = vars(record).pop(TOLD_AT, None) or stamp_now()
        record.batch_stamp = (at, run.log_context if run else {})
        log_lines.settle(record)
        if run is not None:
            run.keep_line(at, record.levelname.lower(), record.name, log_lines.text(record))


class _Waiting(queue.SimpleQueue[logging.LogRecord]):
    """Records that wait for the writing thread, and their size in bytes.

    Only the loggers write `added`, and only the writing thread writes `taken`, so no lock is
    needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.added = self.taken = 0

    @property
    def is_full(self) -> bool:
        return self.qsize() >= MAX_WAITING or self.added - self.taken >= MAX_WAITING_BYTES


class _Queue(logging.handlers.QueueHandler):
    """Passes copies of records to the writing thread. Drops them while the queue is full, and then
    logs their number.
    """

    queue: _Waiting
    _lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The constructor would look up values that are overwritten here.
        copied = logging.LogRecord.__new__(logging.LogRecord)
        vars(copied).update(vars(record))  # later handlers may change the original
        return copied

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.is_full:
            self._lost += 1
            return
        if self._lost:
            text = (
                f"{self._lost:,} lines were dropped, because they were logged faster than they "
                "could be written"
            )
            warning = logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
            warning.batch_stamp = (record.batch_stamp[0], {})  # type: ignore[attr-defined]
            self._lost = 0
            self._put(warning)
        self._put(record)

    def _put(self, record: logging.LogRecord) -> None:
        size = log_lines.size(record)
        record.batch_size = size
        self.queue.added += size
        super().enqueue(record)


class _Writer(logging.handlers.QueueListener):
    """Renders and writes lines in a thread. While a write hangs, it holds no lock that the end of
    the process needs.
    """

    queue: _Waiting

    def __init__(self, lines: _Waiting, format: str, stream: TextIO) -> None:
        super().__init__(lines)
        self._format = format
        self._stream = stream

    @cached_property
    def _formatter(self) -> logging.Formatter:
        """Made for the first line, because most commands write none and structlog takes long to
        import.
        """
        from batch_system.logs import rendering

        return rendering.formatter(self._format, colors=self._stream.isatty())

    def handle(self, record: logging.LogRecord) -> None:
        try:
            text = self._formatter.format(record)
        except Exception as error:  # noqa: BLE001
            # The background loop's boundary: later lines must still be written.
            text = escaping.line(
                f"a line of the logger {record.name} can't be rendered: {type(error).__name__}"
            )
        # The pipe may have no reader, or the stream may be closed.
        with contextlib.suppress(OSError, ValueError):
            self._write(f"{text}\n")
        self.queue.taken += record.batch_size  # type: ignore[attr-defined]

    def _write(self, text: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except OSError:  # a stream in memory, such as StringIO
            self._stream.write(text)
            return
        data = text.encode("utf-8", "backslashreplace")
        while data:
            data = data[os.write(descriptor, data) :]

    def finish(self, seconds: float) -> None:
        """Stop the thread after it has written the queued lines. Returns after at most
        `seconds`.
        """
        self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(seconds)

    def restart(self) -> None:
        """Start the thread again after `finish`, unless it still hangs in a write."""
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
            self.start()


_writer: _Writer | None = None


def set_up(
    level: str = "INFO",
    format: str = "console",
    stream: TextIO | None = None,
    *,
    lazily: bool = False,
) -> None:
    """Write all logging of this process to `stream` (by default stderr), as `console` or `json`
    lines.

    It may be called again, and replaces the handlers of the root logger.

    `lazily`: import structlog, which takes long, only when the first line is logged. Most commands
    log none.
    """
    global _writer
    flush()
    lines = _Waiting()
    _writer = _Writer(lines, format, stream or sys.stderr)
    _writer.start()
    mode.is_set_up = True
    if not lazily:
        from batch_system.logs import structured

        structured.configure()
    root = logging.getLogger()
    root.handlers[:] = [RunLogHandler(), _Queue(lines)]
    root.setLevel(level)
    for chatty in ("apscheduler", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))


@contextlib.contextmanager
def keep_run_lines(level: str = "INFO") -> Iterator[None]:
    """Keep the lines of runs for the ledger in an application with logging of its own, which is not
    changed.

    Lines of `get_logger` are kept from `level` on. Lines of other loggers are kept if the
    application's own levels let them through. After `set_up` this does nothing, because its
    handlers keep the lines.
    """
    if mode.is_set_up:
        yield
        return
    make_record = logging.getLogRecordFactory()

    # A handler would not be enough: it would not get the records of loggers that don't propagate,
    # and in an application without handlers Python would no longer print warnings to stderr.
    def make_and_keep(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
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
            logging.setLogRecordFactory(make_record)


def _keep_copy(record: logging.LogRecord, run: RunLog) -> None:
    """Keep a copy's line, so that the application's handlers get the record unchanged."""
    settled = copy.copy(record)
    # The record comes from the application's own structlog.
    if isinstance(settled.msg, dict) and "event" in settled.msg:
        settled._logger = None
    log_lines.settle(settled)
    run.keep_line(stamp_now(), record.levelname.lower(), record.name, log_lines.text(settled))


def flush() -> None:
    """Write the queued lines and stop. Later lines are lost until `set_up` is called again.

    It is called at exit. Lines that can't be written within FLUSH_SECONDS are lost.
    """
    global _writer
    if _writer is not None:
        writer, _writer = _writer, None
        writer.finish(FLUSH_SECONDS)


def catch_up() -> None:
    """Write the queued lines and continue, because a process may go on after its service has
    ended.
    """
    if _writer is not None:
        _writer.finish(FLUSH_SECONDS)
        _writer.restart()


atexit.register(flush)
