"""Makes the structlog loggers behind `get_logger`. Imported when the first line is logged."""

from __future__ import annotations

import logging
from typing import Any

import structlog
from structlog.stdlib import NAME_TO_LEVEL  # type: ignore[attr-defined]
from structlog.typing import EventDict, Processor, WrappedLogger

from batch_system.logs import log_lines, rendering
from batch_system.logs.mode import mode, run_log, stamp_now

_FACTORY = structlog.stdlib.LoggerFactory()


def make_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structlog logger that writes to the stdlib logger of this name."""
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        _FACTORY(name),
        processors=_PROCESSORS,
        wrapper_class=structlog.stdlib.BoundLogger,
        context_class=dict,
    ).bind()
    return logger


def configure() -> None:
    """Give the loggers of structlog.get_logger() the same processors."""
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=_FACTORY,
        cache_logger_on_first_use=True,
    )


def _filter(logger: logging.Logger, method: str, event: EventDict) -> EventDict:
    """Drop a line that is neither shown nor kept."""
    if _is_shown(logger, method) or _is_kept(method):
        return event
    raise structlog.DropEvent


def _is_shown(logger: logging.Logger, method: str) -> bool:
    return not logger.disabled and NAME_TO_LEVEL[method] >= logger.getEffectiveLevel()


def _is_kept(method: str) -> bool:
    """Whether LOG_LEVEL keeps the line of a run for the ledger, in an application whose loggers
    have their own levels.
    """
    return (
        mode.kept_level is not None
        and run_log.get() is not None
        and NAME_TO_LEVEL[method] >= mode.kept_level
    )


def _positional(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Format `info("%s of %s", 1, 2)`. As in stdlib, arguments that do not fit the text do not
    raise.
    """
    args = event.pop("positional_args", ())
    try:
        return _FORMAT(logger, method, {**event, "positional_args": args})
    except Exception:  # noqa: BLE001 - an author's __str__ may raise anything
        return {**event, "args": args}


_FORMAT = structlog.stdlib.PositionalArgumentsFormatter()


def _hand_over(logger: logging.Logger, method: str, event: EventDict) -> Any:
    """Pass the line to the handlers of `set_up`, or to stdlib logging if `set_up` was not called,
    as in an application.
    """
    if mode.is_set_up:
        return structlog.stdlib.ProcessorFormatter.wrap_for_formatter(logger, method, event)
    failure = log_lines.failure(event.pop("exc_info", None))
    text = log_lines.line(log_lines.values_of(event))
    if _is_shown(logger, method):
        return (text,), {"exc_info": failure}
    if run := run_log.get():
        run.keep_line(
            stamp_now(), event["level"], logger.name, log_lines.with_traceback(text, failure)
        )
    raise structlog.DropEvent


_PROCESSORS: list[Processor] = [_filter, *rendering.SHARED, _positional, _hand_over]

if mode.is_set_up:  # lazily
    configure()
