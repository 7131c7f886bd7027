"""Logs: structlog over stdlib logging. Inside a run every line carries the run, and is kept for the ledger.

Rendering and writing happen in a thread, so that a slow terminal or pipe never holds up the event loop.
"""

from __future__ import annotations

import atexit
import logging
import logging.handlers
import queue
import sys
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from service import clock


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


def _stamp(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add what RunLogHandler put on the record: when it was made, and the run it belongs to."""
    event.pop("stamp", None)
    at, context = event["_record"].stamp
    return {"timestamp": at, **event, **context}


SHARED: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.processors.StackInfoRenderer(),
]

# Sensible also where nobody calls set_up: a task run by hand in a shell logs through stdlib's own defaults.
structlog.configure(
    processors=[structlog.stdlib.filter_by_level, *SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
    wrapper_class=structlog.stdlib.BoundLogger,
    logger_factory=structlog.stdlib.LoggerFactory(),
    cache_logger_on_first_use=True,
)


def _text(record: logging.LogRecord) -> str:
    """The line as the ledger keeps it: message, key=value pairs, traceback."""
    if isinstance(record.msg, dict):
        pairs = {k: v for k, v in record.msg.items() if k not in _OWN_KEYS}
        text = " ".join([str(record.msg.get("event", "")), *(f"{k}={v!r}" for k, v in pairs.items())])
        failure = record.msg.get("exc_info") or record.exc_info
    else:
        text, failure = record.getMessage(), record.exc_info
    shown = _traceback(failure)
    return f"{text}\n{shown}" if shown else text


_OWN_KEYS = {"event", "level", "logger", "exc_info", "stack", "timestamp", "_record", "_from_structlog"}


def _traceback(failure: Any) -> str:
    if failure is True:
        failure = sys.exc_info()
    if isinstance(failure, tuple):
        failure = failure[1]
    if not isinstance(failure, BaseException):
        return ""
    return "".join(traceback.format_exception(failure)).rstrip()


class RunLogHandler(logging.Handler):
    """Stamps each record with the time and its run, and hands the line to the run. Knows no database."""

    def emit(self, record: logging.LogRecord) -> None:
        run = run_log.get()
        at = clock.now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record.stamp = (at, run.log_context if run else {})
        if run is not None:
            run.keep_line(at, record.levelname.lower(), record.name, _text(record))


class _InProcessQueueHandler(logging.handlers.QueueHandler):
    """Leaves the record whole: it is rendered by the listener's thread of this same process."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        if isinstance(record.msg, dict) and record.msg.get("exc_info") is True:
            record.msg["exc_info"] = sys.exc_info()
        return record


_stop_writing: Callable[[], None] | None = None


def set_up(level: str = "INFO", format: str = "console", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (stderr), as `console` or `json` lines. May be called again."""
    global _stop_writing
    flush()
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(format, colors=stream.isatty()))
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, handler)
    listener.start()
    _stop_writing = listener.stop
    root = logging.getLogger()
    root.handlers[:] = [RunLogHandler(), _InProcessQueueHandler(lines)]
    root.setLevel(level)
    for chatty in ("apscheduler", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))


def flush() -> None:
    """Write what is still queued. Called at exit; after it lines are lost until `set_up` is called again."""
    global _stop_writing
    if _stop_writing is not None:
        stop, _stop_writing = _stop_writing, None
        stop()


atexit.register(flush)


def _formatter(format: str, colors: bool) -> logging.Formatter:
    tail: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if format == "json":
        tail += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        tail += [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*SHARED, structlog.stdlib.ExtraAdder()], processors=[_stamp, *tail]
    )
