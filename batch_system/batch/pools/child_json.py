"""The messages between a service and a child as JSON values and back: runs, endings, and requests
of `start()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from batch_system import failures
from batch_system.batch.context.upstream import Done
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import RANK_OF_PRIORITY, RunState
from batch_system.batch.queue.requests import Merging, Startable, StartedRun, StartRequest, Starts
from batch_system.batch.tasks.limit import Queueing
from batch_system.batch.tasks.retry_after import MOST_SECONDS
from batch_system.errors import (
    BatchError,
    DatabaseError,
    DatabaseUnreachable,
    InvalidParameters,
    LeaseLost,
    TooManyWaiting,
    UnknownTask,
)

Json = dict[str, Any]

_STARTING = (
    *(UnknownTask, InvalidParameters, TooManyWaiting),
    *(DatabaseError, DatabaseUnreachable, LeaseLost),
)
STARTING = {cls.__name__: cls for cls in _STARTING}
"""The errors of `start()` that a child raises with the class that the service has raised."""
_INSTANTS = ("slot", "created_at", "attempt_started_at")


def claimed_as_json(claimed: Claimed) -> Json:
    values = asdict(claimed)
    return {**values, **{name: values[name] and values[name].isoformat() for name in _INSTANTS}}


def claimed_from_json(values: Json) -> Claimed:
    return Claimed(**{**values, **{name: _instant(values[name]) for name in _INSTANTS}})


def ending_as_json(ending: Ending) -> Json:
    facts = failures.facts_of(ending.error) if ending.error is not None else None
    values = {
        name: getattr(ending, name)
        for name in ("outcome", "reason", "result", "wait", "fingerprint", "parts")
    }
    return {**values, "state": ending.state.value, "error": facts}


def ending_from_json(values: Json) -> Ending:
    """The ending. Its error is a ReportedError. Raises KeyError, TypeError or ValueError if the
    values are not an ending.
    """
    facts, wait = values["error"], values["wait"]
    if wait is not None and not 0 <= wait < MOST_SECONDS:
        raise ValueError(f"wait is {wait!r}")
    return Ending(
        RunState(values["state"]),
        str(values["outcome"]),
        _text(values["reason"]),
        values["result"],
        failures.reported(facts) if facts is not None else None,
        float(wait) if wait is not None else None,
        _text(values["fingerprint"]),
        values["parts"],
    )


def done_as_json(done: Done) -> Json:
    return {**asdict(done), "slot": _stamp(done.slot)}


def done_from_json(values: Json) -> Done:
    return Done(**{**values, "slot": _instant(values["slot"])})


def starts_as_json(starts: Starts) -> Json:
    then = _request_as_json(starts.then) if starts.then is not None else None
    each = [_request_as_json(request) for request in starts.runs]
    return {"runs": each, "then": then, "gate": starts.gate, "in_group": starts.in_group}


def starts_from_json(values: Json) -> Starts:
    """The requests. Raises KeyError, TypeError or ValueError if the values are not requests."""
    then = _request_from_json(values["then"]) if values["then"] is not None else None
    each = tuple(_request_from_json(request) for request in values["runs"])
    return Starts(each, then, _text(values["gate"]), bool(values["in_group"]))


def _request_as_json(request: StartRequest) -> Json:
    return {**asdict(request), **{name: _stamp(getattr(request, name)) for name in ("slot", "at")}}


def _request_from_json(values: Json) -> StartRequest:
    task = values["task"]
    queueing = Queueing.of_json(str(task["name"]), task["queueing"])
    startable = Startable(str(task["name"]), str(task["source"]), queueing, int(task["priority"]))
    params = dict(values["params"]) if values["params"] is not None else None
    delay = float(values["delay"]) if values["delay"] is not None else None
    at, slot = _instant(values["at"]), _instant(values["slot"])
    merging = Merging(**values["merging"]) if values["merging"] is not None else None
    priority = values["priority"]
    if priority is not None and priority not in RANK_OF_PRIORITY:
        raise ValueError(f"priority is {priority!r}")
    key = _text(values["key"])
    return StartRequest(startable, params, key, slot, at, delay, merging, priority)


def started_as_json(run: StartedRun) -> Json:
    return {"id": str(run), "how": run.how, "until": _stamp(run.until)}


def started_from_json(values: Json) -> StartedRun:
    return StartedRun(values["id"], values["how"], _instant(values["until"]))


def answer_as_json(error: Exception) -> Json:
    """The error of a start."""
    kind = next((name for name, cls in STARTING.items() if type(error) is cls), BatchError.__name__)
    return {"error": kind, "message": failures.message_of(error)}


def error_from_json(values: Mapping[str, Any]) -> BatchError:
    return STARTING.get(values["error"], BatchError)(str(values["message"]))


def _text(value: Any) -> str | None:
    return str(value) if value is not None else None


def _stamp(instant: datetime | None) -> str | None:
    return instant.isoformat() if instant is not None else None


def _instant(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text is not None else None
