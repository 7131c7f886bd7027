"""Sends errors to Sentry: each line logged as an error becomes an event, and events of a run have
tags that name it.

The logging integration of the SDK makes the events. A failed attempt logs its error, so it becomes
one event too. The SDK is imported only if SENTRY_DSN is set, or if the application uses Sentry
itself.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC
from functools import cache
from typing import TYPE_CHECKING, Any

from batch_system.batch.context.current_run import CurrentRun, current_run_if_any, state_of
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidSetting
from batch_system.settings.settings import Settings
from batch_system.versions import package_version

if TYPE_CHECKING:
    from sentry_sdk.client import BaseClient
    from sentry_sdk.types import Event, Hint

FLUSH_SECONDS = 2.0
"""How long the service waits at its end for events that have not been sent yet, in seconds."""

REPORTED = "_batch_reported_for"


@asynccontextmanager
async def reporting(settings: Settings) -> AsyncIterator[None]:
    """Report errors within the block, through the application's own Sentry client if it has one.

    Raises InvalidSetting if SENTRY_DSN can't be used.
    """
    if settings.SENTRY_DSN is None and sys.modules.get("sentry_sdk") is None:
        yield
        return
    own = _begin(settings)
    try:
        yield
    finally:
        await offload(_end, own)


def _begin(settings: Settings) -> BaseClient | None:
    """The client that was made for this service, or None if the application has one."""
    try:
        import sentry_sdk
    except ImportError:
        raise InvalidSetting(
            "setting SENTRY_DSN: sending errors to Sentry needs the extra `sentry`: "
            "pip install 'batch-system[sentry]'"
        ) from None
    _tag_events()
    if settings.SENTRY_DSN is None or sentry_sdk.is_initialized():
        return None
    sentry_sdk.init(**_options(settings, settings.SENTRY_DSN))
    return sentry_sdk.get_client()


def _options(settings: Settings, dsn: str) -> dict[str, Any]:
    """Options that send only errors, and no values, because local variables and command lines may
    hold passwords.

    (Personal data is not sent by default, and passing `send_default_pii` is deprecated.)
    """
    from sentry_sdk.integrations.logging import LoggingIntegration
    from sentry_sdk.utils import BadDsn, Dsn

    try:
        Dsn(dsn)
    except (BadDsn, ValueError):  # the text of the error may contain a part of the key
        raise InvalidSetting(
            "setting SENTRY_DSN: not a DSN, which looks like https://key@host/1"
        ) from None
    return {
        "dsn": dsn,
        "release": getattr(settings, "SENTRY_RELEASE", f"batch-system@{package_version()}"),
        "environment": getattr(settings, "SENTRY_ENVIRONMENT", None),
        "default_integrations": False,
        "auto_enabling_integrations": False,
        "integrations": [
            LoggingIntegration(level=None, event_level=logging.ERROR, sentry_logs_level=None)
        ],
        "include_local_variables": False,
        "auto_session_tracking": False,
    }


def _end(own: BaseClient | None) -> None:
    import sentry_sdk

    sentry_sdk.flush(timeout=FLUSH_SECONDS)
    if own is None:
        return
    own.close(timeout=0)
    scope = sentry_sdk.get_global_scope()
    if scope.client is own:  # so that a later service in this process starts with a new client
        scope.set_client(None)


def flush() -> None:
    """Send the waiting events before the process ends. Does nothing if Sentry is not used."""
    if (sdk := sys.modules.get("sentry_sdk")) is not None:
        sdk.flush(timeout=FLUSH_SECONDS)


@cache
def _tag_events() -> None:
    """Install the processor once in a process. The SDK can't remove one, and outside of runs this
    one changes nothing.
    """
    from sentry_sdk.scope import add_global_event_processor

    add_global_event_processor(_with_run)


def _with_run(event: Event, hint: Hint) -> Event | None:
    """The event with the run's tags, or None if the same error was already sent."""
    event.get("extra", {}).pop("batch_stamp", None)
    run = current_run_if_any()
    if run is None:
        return event
    if _was_sent(hint, run):
        return None
    slot = run.slot.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds")
    tags = {"task": run.task, "run": run.id, "slot": f"{slot}Z", "attempt": str(run.attempt)}
    event.setdefault("tags", {}).update(tags)
    if state_of(run).will_retry:
        event["level"] = "warning"
    if _has_no_traceback(event):  # otherwise the timeouts of all tasks would be one issue
        event["fingerprint"] = ["{{ default }}", run.task]
    return event


def _was_sent(hint: Hint, run: CurrentRun) -> bool:
    """Whether this attempt has already sent this error: a run may log its error and raise it
    again.
    """
    error = hint.get("exc_info", (None, None, None))[1]
    if error is None:
        return False
    attempt, reported = (run.id, run.attempt), vars(error).get(REPORTED)
    vars(error)[REPORTED] = attempt
    return bool(reported == attempt)


def _has_no_traceback(event: Event) -> bool:
    errors = event.get("exception", {}).get("values", [])
    return bool(errors) and not any(error.get("stacktrace") for error in errors)
