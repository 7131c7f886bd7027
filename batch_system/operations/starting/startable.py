"""A task that can be started: one that this process has loaded, or one that only other processes
have loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.execution.run_here import checked_parameters
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.queue.enqueue import Startable
from batch_system.batch.tasks.limit import Queueing
from batch_system.batch.tasks.parameters import SLOT, TOO_DEEP, refused
from batch_system.batch.tasks.registry import Task
from batch_system.errors import InvalidParameters, NoLedger, UnknownTask
from batch_system.escaping import brief, echoed, is_deep
from batch_system.operations.asking.context import Context
from batch_system.redaction import Redaction

LONGEST_SENTENCE = 500
MOST_SENTENCES = 20


@dataclass(frozen=True)
class StartableTask(Startable):
    """What is needed to queue a run. `schema`: the JSON schema of the parameters of a task that is
    not loaded here.

    `redaction`: an error about a secret parameter does not show its value.
    """

    loaded: Task | None
    schema: Mapping[str, Any] | None
    redaction: Redaction

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any] | None:
        """Check parameters, and return them as the ledger stores them. Raises InvalidParameters."""
        if self.loaded is not None:
            return checked_parameters(self.loaded, given)
        return _checked_by_schema(self.name, self.schema, given, self.redaction)


async def startable_task(connection: AsyncConnection, context: Context, name: str) -> StartableTask:
    """The task of this name. A task that is loaded here is preferred. Raises UnknownTask, which
    lists names.
    """
    loaded = context.loaded().tasks.get(name)
    if loaded is not None:
        priority = loaded.policies.priority
        return StartableTask(
            name, loaded.source, loaded.queueing, priority, loaded, None, context.redaction
        )
    row = await task_rows.get(connection, name)
    if row is None or row["removed_at"] is not None:
        raise await unknown_task(connection, context, name)
    policies = row["policies"] if isinstance(row["policies"], Mapping) else {}
    schema = row["parameters"] if isinstance(row["parameters"], Mapping) else None
    priority = given if isinstance(given := policies.get("priority"), int) else 0
    queueing = Queueing.of_policies(name, policies)
    return StartableTask(name, row["source"], queueing, priority, None, schema, context.redaction)


async def mistakes_in(context: Context, name: str, given: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with these parameters of a task, by their places, as a start would say it; it
    starts nothing. Raises UnknownTask and NoLedger.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        startable = await startable_task(connection, context, name)
    try:
        startable.checked(given)
    except InvalidParameters as error:
        return error.fields
    return {}


async def unknown_task(
    connection: AsyncConnection | None, context: Context, name: str
) -> UnknownTask:
    """The error about a name that no task has. It lists the tasks, and first the one with a similar
    name.
    """
    names = set(context.loaded().tasks)
    if connection is not None:
        names |= set(await task_rows.listed(connection))
    return UnknownTask.named(name, names)


def _checked_by_schema(
    task: str, schema: Mapping[str, Any] | None, given: Mapping[str, Any], redaction: Redaction
) -> dict[str, Any] | None:
    """Check the parameters of a task that this process has not loaded.

    A text is also taken for the number or the other JSON value that it spells, because a command
    line gives only texts.
    """
    from jsonschema import Draft202012Validator

    if SLOT in given:
        raise InvalidParameters(f"parameter {SLOT}: it is the run's slot, so give it as the slot")
    if schema is None:
        raise InvalidParameters(
            f"parameters of task {task}: this ledger does not know them; start it where it is "
            "loaded"
        )
    validator = Draft202012Validator(schema)
    properties = schema.get("properties", {})
    values = {name: _read_as(properties.get(name), value) for name, value in given.items()}
    if deep := next((name for name, value in values.items() if is_deep(value)), None):
        sentence = f"{brief(deep)}: {TOO_DEEP}"
        raise refused(task, sentence, {deep: sentence}, list(properties))
    fields: dict[str, str] = {}
    for error in islice(validator.iter_errors(values), MOST_SENTENCES):
        for name, sentence in _sentences(error, schema, values, redaction):
            fields.setdefault(name, sentence)
    if fields:
        raise refused(task, "; ".join(fields.values()), fields, list(properties))
    return values or None


def _sentences(
    error: Any, schema: Mapping[str, Any], values: Mapping[str, Any], redaction: Redaction
) -> Iterator[tuple[str, str]]:
    """What is wrong, by the name of the parameter, as for a task that is loaded."""
    if not error.absolute_path and error.validator == "required":
        missing = (name for name in schema["required"] if name not in values)
        yield from ((name, f"{name} is required") for name in missing)
        return
    if not error.absolute_path and error.validator == "additionalProperties":
        unknown = (name for name in values if name not in schema.get("properties", {}))
        yield from ((name, f"there is no parameter {echoed(name)}") for name in unknown)
        return
    where = ".".join(str(part) for part in error.absolute_path)
    is_secret = redaction.is_secret(where) or redaction.masked(error.instance) != error.instance
    yield (
        str(error.absolute_path[0]) if error.absolute_path else "",
        f"{where} has a value that is not allowed"
        if is_secret
        else f"{where}: {brief(error.message, LONGEST_SENTENCE)}".removeprefix(": "),
    )


def _read_as(schema: Any, value: Any) -> Any:
    """The value; a text that spells a JSON value is that value, if the schema takes no text."""
    if (
        not isinstance(value, str)
        or not isinstance(schema, Mapping)
        or schema.get("type") == "string"
    ):
        return value
    if "type" not in schema and "anyOf" not in schema:
        return value
    if any(
        isinstance(each, Mapping) and each.get("type") == "string"
        for each in schema.get("anyOf", [])
    ):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
