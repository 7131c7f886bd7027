"""Logs: structlog over stdlib logging. Inside a run every line carries the run, and is kept for the ledger.

Rendering and writing happen in a thread, so that a slow terminal or pipe never holds up the event loop.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import logging.handlers
import math
import os
import queue
import sys
import traceback
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from service import clock

MAX_WAITING = 100_000
"""Lines that may wait for a slow stderr."""

FLUSH_SECONDS = 5.0


class RunLog(Protocol):
    """What a run offers to its log lines: who it is, and a place to keep them."""

    @property
    def log_context(self) -> dict[str, Any]: ...

    def keep_line(self, at: str, level: str, logger: str, text: str) -> None: ...


run_log: ContextVar[RunLog | None] = ContextVar("run_log", default=None)


def get_logger(name: str | None = None) -> structlog.stdlib.BoundLogger:
    """A logger for `name` (give it `__name__`): `info("text", key=value)`, `error("text", exc_info=error)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def _positional(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """`info("%s of %s", 1, 2)`. As in stdlib, a text that its arguments don't fit doesn't stop the code that logs."""
    args = event.pop("positional_args", ())
    try:
        return _FORMAT(logger, method, {**event, "positional_args": args})
    except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
        return {**event, "args": args}


_FORMAT = structlog.stdlib.PositionalArgumentsFormatter()


def _hand_over(logger: logging.Logger, method: str, event: EventDict) -> Any:
    """To the handlers of `set_up`; where nobody called it (a task run in a shell), as a line of stdlib's own."""
    if _is_set_up:
        return structlog.stdlib.ProcessorFormatter.wrap_for_formatter(logger, method, event)
    return (_line(event),), {"exc_info": _failure(event.get("exc_info"))}


SHARED: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.StackInfoRenderer(),
]

structlog.configure(
    processors=[structlog.stdlib.filter_by_level, *SHARED, _positional, _hand_over],
    wrapper_class=structlog.stdlib.BoundLogger,
    logger_factory=structlog.stdlib.LoggerFactory(),
    cache_logger_on_first_use=True,
)

_OWN_KEYS = {"event", "level", "logger", "exc_info", "stack"}


def _line(event: Mapping[str, Any]) -> str:
    """Message and key=value pairs, without the traceback."""
    pairs = (f"{key}={_plain(value)!r}" for key, value in event.items() if key not in _OWN_KEYS)
    stack = f"\n{event['stack']}" if "stack" in event else ""
    return " ".join([str(event.get("event", "")), *pairs]) + stack


def _failure(given: Any) -> BaseException | None:
    """What `exc_info=` means: an exception, stdlib's tuple, or True for the one that is being handled."""
    if given and not isinstance(given, BaseException | tuple):
        given = sys.exc_info()
    if isinstance(given, tuple):
        given = given[1]
    return given if isinstance(given, BaseException) else None


def _plain(value: Any, depth: int = 5) -> Any:
    """A copy: the line is rendered later, in another thread, while the author's code goes on with its objects."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    try:
        if depth and isinstance(value, dict):
            return {str(key): _plain(item, depth - 1) for key, item in value.items()}
        if depth and isinstance(value, list | tuple | set | frozenset):
            return [_plain(item, depth - 1) for item in value]
        return str(value)
    except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
        return f"<{type(value).__name__} without a text>"


def _settle(record: logging.LogRecord) -> None:
    """Leave nothing in the record that may change before it is rendered."""
    if hasattr(record, "_logger"):  # structlog's
        event: dict[str, Any] = {**cast(EventDict, record.msg)}
        failure = _failure(event.pop("exc_info", None))
        settled = {key: _plain(value) for key, value in event.items()}
        record.msg = {**settled, "exc_info": failure} if failure else settled
        return
    try:
        record.msg = record.getMessage()
    except Exception as error:  # noqa: BLE001 - stdlib would not let it out either
        record.msg = f"{_plain(record.msg)} {_plain(record.args)} ({type(error).__name__}: they don't fit together)"
    if record.stack_info:
        record.msg, record.stack_info = f"{record.msg}\n{record.stack_info}", None
    record.args = None


def _text(record: logging.LogRecord) -> str:
    """The settled line as the ledger keeps it, with its traceback."""
    if isinstance(record.msg, dict):
        text, failure = _line(record.msg), record.msg.get("exc_info")
    else:
        text, failure = record.msg, _failure(record.exc_info)
    return f"{text}\n{''.join(traceback.format_exception(failure)).rstrip()}" if failure else text


class RunLogHandler(logging.Handler):
    """Stamps each record with the time and its run, and hands the line to the run. Knows no database."""

    def emit(self, record: logging.LogRecord) -> None:
        run = run_log.get()
        at = clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record.batch_stamp = (at, run.log_context if run else {})
        _settle(record)
        if run is not None:
            run.keep_line(at, record.levelname.lower(), record.name, _text(record))


class _Queue(logging.handlers.QueueHandler):
    """Hands records, whole, to the thread that writes; beyond MAX_WAITING it drops them, and says so."""

    _lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() >= MAX_WAITING:  # type: ignore[attr-defined]
            self._lost += 1
            return
        if self._lost:
            text = f"{self._lost:,} lines were dropped: they came faster than they could be written"
            made = logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
            made.batch_stamp = (record.batch_stamp[0], {})  # type: ignore[attr-defined]
            self._lost = 0
            super().enqueue(made)
        super().enqueue(record)


class _Writer(logging.handlers.QueueListener):
    """Renders and writes, in a thread of its own. A write that hangs holds no lock that the process needs to end."""

    def __init__(self, lines: queue.SimpleQueue[logging.LogRecord], format: str, stream: TextIO) -> None:
        super().__init__(lines)
        self._formatter = _formatter(format, colors=stream.isatty())
        self._stream = stream

    def handle(self, record: logging.LogRecord) -> None:
        try:
            text = self._formatter.format(record)
        except Exception as error:  # noqa: BLE001 - the background loop's boundary: the lines after it must be written
            text = f"a line of {record.name} can't be shown: {type(error).__name__}"
        with contextlib.suppress(OSError, ValueError):  # nobody reads, or the stream is closed
            self._write(f"{text}\n")

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


_writer: _Writer | None = None
_is_set_up = False


def set_up(level: str = "INFO", format: str = "console", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (stderr), as `console` or `json` lines. May be called again."""
    global _writer, _is_set_up
    flush()
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    _writer = _Writer(lines, format, stream or sys.stderr)
    _writer.start()
    _is_set_up = True
    root = logging.getLogger()
    root.handlers[:] = [RunLogHandler(), _Queue(lines)]
    root.setLevel(level)
    for chatty in ("apscheduler", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))


def flush() -> None:
    """Write what is still queued. Called at exit; after it lines are lost until `set_up` is called again.

    Where nobody reads, the lines are given up after FLUSH_SECONDS.
    """
    global _writer
    if _writer is not None:
        writer, _writer = _writer, None
        writer.finish(FLUSH_SECONDS)


atexit.register(flush)


def _formatter(format: str, colors: bool) -> logging.Formatter:
    tail: list[Processor] = [_stamp, structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if format == "json":
        tail += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        tail += [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*SHARED, structlog.stdlib.ExtraAdder()], processors=tail
    )


def _stamp(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add what RunLogHandler put on the record: when it was made, the run it belongs to."""
    event.pop("batch_stamp", None)
    at, context = event["_record"].batch_stamp
    return {"timestamp": at, **event, **context}
