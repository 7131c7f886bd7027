"""What is masked in a run: parameters with a secret name for everybody, and what a viewer may not
see.

A viewer may not see what a task with the tag "secret" works on: parameters and their defaults,
keys, results, logs, the texts of reasons, errors and progress, the items in quarantine, and what
the audit says about parameters.
"""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import runs as run_rows
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.tasks import SECRET_TAG as SECRET_TAG
from batch_system.errors import Forbidden, InvalidParameters
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.asking.results import Attempt, PartsOfRun, RunDetails, RunRow, RunShort

NOTHING: frozenset[str] = frozenset()
HIDDEN = {"reason": None, "message": None}

R = TypeVar("R", bound=RunRow[Any])
S = TypeVar("S", bound=RunShort[Any])


async def hidden_tasks(connection: AsyncConnection, context: Context) -> frozenset[str]:
    """The tasks of which the caller sees only states and times."""
    if context.actor.may("operator"):
        return NOTHING
    return await task_rows.tagged(connection, SECRET_TAG)


def hides_change(action: str, task: str | None, hidden: frozenset[str]) -> bool:
    """Whether the caller may not see what the audit says about a change. A bulk may be about runs
    of any task.
    """
    return task in hidden or bool(hidden and action.startswith("bulk."))


async def refuse_hidden_log(context: Context, run: str) -> None:
    """Raises Forbidden if the caller may not read the log of this run."""
    async with context.databases.reading() as connection:
        row = await run_rows.get(connection, run) if connection is not None else None
        if (
            connection is not None
            and row is not None
            and row["task"] in await hidden_tasks(connection, context)
        ):
            raise Forbidden(
                f"a viewer may not read logs of {row['task']}, because it has the tag {SECRET_TAG}"
            )


async def redacted(connection: AsyncConnection, context: Context, run: R) -> R:
    """The run as the caller may see it."""
    if run.task in await hidden_tasks(connection, context):
        more: dict[str, Any] = dict.fromkeys(
            ("params", "result", "cancel_reason", "key", "fingerprint")
        )
        if isinstance(run, RunDetails):
            more |= {"log": [], "attempts": [_without_error(attempt) for attempt in run.attempts]}
            more |= {"parts": _without_reasons(run.parts) if run.parts is not None else None}
        return run.model_copy(update={**HIDDEN, **more})
    masked = context.redaction.masked
    return run.model_copy(update={"params": masked(run.params), "result": masked(run.result)})


def _without_reasons(parts: PartsOfRun) -> PartsOfRun:
    return parts.model_copy(
        update={"parts": [part.model_copy(update={"reason": None}) for part in parts.parts]}
    )


def _without_error(attempt: Attempt) -> Attempt:
    return attempt.model_copy(update={"error": None})


def without_texts(runs: list[S], hidden: frozenset[str]) -> list[S]:
    """The runs of a list as the caller may see them. `hidden`: as `hidden_tasks` returns them."""
    return [run.model_copy(update=HIDDEN) if run.task in hidden else run for run in runs]


def refuse_secret_filter(context: Context, wanted: RunFilter) -> None:
    """Raises InvalidParameters for a filter by a value that is masked: the answer would reveal
    whether a guess is right.
    """
    secrets = [name for name in wanted.params if context.redaction.is_secret(name)]
    if secrets:
        raise InvalidParameters(
            f"param: the values of {', '.join(secrets)} are secret, so runs are not found by them"
        )
