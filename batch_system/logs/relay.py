"""Lines that one process logs and another one writes: those of a run in a child process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from batch_system import failures
from batch_system.logs import log_lines
from batch_system.logs.mode import TOLD_AT, mode, run_log, stamp_now

Line = dict[str, Any]
"""A line as JSON values: `at`, `level`, `logger`, `event` (a text, or the values of structlog), and
`error` or None.
"""


class _Teller(logging.Handler):
    """Passes each record to `tell` as a Line."""

    def __init__(self, tell: Callable[[Line], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        at = stamp_now()
        log_lines.settle(record)
        event = record.msg
        if isinstance(event, dict):
            event = dict(event)
            error = event.pop("exc_info", None)
        else:
            error = log_lines.failure(record.exc_info)
        facts = failures.facts_of(error) if error else None
        self._tell(
            {
                "at": at,
                "level": record.levelname.lower(),
                "logger": record.name,
                "event": event,
                "error": facts,
            }
        )


def tell_lines(tell: Callable[[Line], None], level: str) -> None:
    """Pass all lines of this process from `level` on to `tell`, in the thread that logs them, and
    write none.
    """
    from batch_system.logs import structured

    mode.is_set_up = True
    structured.configure()
    root = logging.getLogger()
    root.handlers[:] = [_Teller(tell)]
    root.setLevel(level)
    for chatty in ("apscheduler", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level)))


def told(at: str, level: str, logger: str, text: str) -> Line:
    """A line with this text."""
    return {"at": at, "level": level, "logger": logger, "event": text, "error": None}


def write(line: Mapping[str, Any]) -> None:
    """Log a line of another process here: it is kept for the run of this context, and written to
    the log, each once.

    Raises KeyError, TypeError or ValueError if it is not a Line.
    """
    record = _record_of(line)
    logger = logging.getLogger(record.name)
    if mode.is_set_up:
        if not logger.disabled:
            logger.handle(record)
        return
    # This application has logging of its own, and gets the text, as from a line that was logged in
    # this process.
    log_lines.settle(record)
    if run := run_log.get():
        run.keep_line(line["at"], record.levelname.lower(), record.name, log_lines.text(record))
    if logger.isEnabledFor(record.levelno):
        if isinstance(record.msg, dict):
            record.msg = log_lines.line(record.msg)
            vars(record).pop("_logger"), vars(record).pop("_name")
        vars(record).pop(TOLD_AT)
        logger.handle(record)


def _record_of(line: Mapping[str, Any]) -> logging.LogRecord:
    """A record as a logger of this process would have made it. The factory does not make it,
    because the factory may keep it.
    """
    name, event, facts = str(line["logger"]), line["event"], line["error"]
    number = logging.getLevelNamesMapping().get(str(line["level"]).upper(), logging.INFO)
    error = failures.reported(facts) if facts is not None else None
    exc_info = (type(error), error, None) if error is not None else None
    record = logging.LogRecord(name, number, "", 0, str(event), None, exc_info)
    if isinstance(event, dict):
        record.msg = {**event, "exc_info": error} if error is not None else dict(event)
        vars(record).update(_logger=logging.getLogger(name), _name=record.levelname.lower())
    setattr(record, TOLD_AT, str(line["at"])[:40])
    return record
