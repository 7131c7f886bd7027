"""Renders lines for stderr, for people or as JSON, in the thread that writes them."""

from __future__ import annotations

import logging
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from batch_system import escaping, failures
from batch_system.logs.log_lines import FIELDS

INDENT = "    "
"""Indents the later lines of a message in the console format, so that they can't look like a line
of their own.
"""

SHARED: list[Processor] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.StackInfoRenderer(),
]


def formatter(format: str, colors: bool) -> logging.Formatter:
    """A formatter for settled records; `format` is `console` or `json`, and `colors` is for the
    console.
    """
    tail: list[Processor] = [_stamp, structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if format == "json":
        as_text = structlog.processors.ExceptionRenderer(
            lambda exc_info: failures.traceback_of(exc_info[1])
        )
        tail += [
            _with_fields,
            as_text,
            structlog.processors.JSONRenderer(default=str),
            _without_delete,
        ]
    else:
        console = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_write_traceback)
        tail += [_without_fields, _escaped, console, _indented]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*SHARED, structlog.stdlib.ExtraAdder()], processors=tail
    )


def _with_fields(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the values that only JSON lines have."""
    fields = event.pop(FIELDS, {})
    return {**event, **fields}


def _without_fields(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.pop(FIELDS, None)
    return event


def _without_delete(_: WrappedLogger, __: str, encoded: Any) -> str:
    """Escape DELETE, the only character of ASCII-only JSON that has an effect in a terminal."""
    return str(encoded).replace("\x7f", "\\u007f")


def _indented(_: WrappedLogger, __: str, text: Any) -> str:
    return str(text).replace("\n", f"\n{INDENT}")


def _write_traceback(stream: TextIO, exc_info: Any) -> None:
    stream.write(f"\n{escaping.lines(failures.traceback_of(exc_info[1]))}")


class _AsWritten:
    """A value that the renderer shows as its Python literal."""

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)


def _escaped(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Escape control characters before colours are added, so that only the colours have an effect
    in a terminal.
    """
    return {
        key if key.isprintable() else escaping.line(key): _escape_value(key, value)
        for key, value in event.items()
    }


def _escape_value(key: str, value: Any) -> Any:
    if not isinstance(value, str) or value.isprintable():
        return value
    if key in ("event", "stack"):
        return escaping.lines(value)
    return value if escaping.line(value) == value else _AsWritten(value)


def _stamp(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Add the time and the context of the run, which RunLogHandler has put on the record."""
    event.pop("batch_stamp", None)
    event.pop("batch_size", None)
    at, context = event["_record"].batch_stamp
    return {"timestamp": at, **event, **context}
