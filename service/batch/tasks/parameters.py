"""The parameters of a task: the signature of `run` is the schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NotRequired

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError
from typing_extensions import TypedDict

from service import failures
from service.errors import InvalidParameters, InvalidTask
from service.escaping import echoed

SLOT = "slot"


class Parameters:
    """What `run` (bound) takes. A parameter named `slot` is filled with the run's slot when it is not given."""

    def __init__(self, task: str, run: Callable[..., Any]) -> None:
        self._task = task
        taken = _taken(run)
        self.names = list(taken)
        self.takes_slot = SLOT in taken
        self.required = [name for name, p in taken.items() if p.default is p.empty and name != SLOT]
        """Those without a default: a scheduled run can't fill them."""
        self._schema = _schema(taken, self.required)

    def to_json(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check `given` (values or their text forms) and return what the ledger stores: only what was given.

        Raises InvalidParameters naming the task, the parameter, and what is allowed.
        """
        checked = self._check(given)
        slot = checked.get(SLOT)
        if isinstance(slot, datetime) and slot.utcoffset() is None:
            raise self._refused(f"slot is {echoed(given[SLOT])}: it needs an offset, as in 2026-11-25T02:00+09:00")
        try:
            return dict(self._schema.dump_python(checked, mode="json"))
        except (PydanticSerializationError, ValueError, RecursionError) as error:  # such as what holds itself
            raise self._refused(f"the ledger can't store them: {error}") from None

    def to_call(self, stored: Mapping[str, Any], slot: datetime) -> dict[str, Any]:
        """The keyword arguments for one attempt."""
        given = {SLOT: slot, **stored} if self.takes_slot else stored
        return self._check(given) if given or self.required else {}

    def _check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return dict(self._schema.validate_python(dict(given)))
        except ValidationError as error:
            raise self._refused("; ".join(_sentence(e) for e in error.errors())) from None

    def _refused(self, reason: str) -> InvalidParameters:
        allowed = f"it takes {', '.join(self.names)}" if self.names else "it takes none"
        return InvalidParameters(f"parameters of task {self._task}: {reason} ({allowed})")


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no parameter {echoed(name)}"
    if error["type"] == "missing":
        return f"{name} is required"
    return f"{name} is {echoed(error['input'])}: {error['msg']}"


def _taken(run: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        signature = inspect.signature(run, eval_str=True)
    except Exception as error:  # an annotation in quotes is code, and may raise anything
        raise InvalidTask(f"the signature of run() can't be read: {failures.message_of(error)}") from error
    taken = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise InvalidTask(f"run() takes {name!r} by position only; parameters are passed by name: take out the `/`")
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            taken[name] = parameter
    return taken


def _schema(taken: Mapping[str, inspect.Parameter], required: list[str]) -> TypeAdapter[Any]:
    kinds = {name: Any if p.annotation is p.empty else p.annotation for name, p in taken.items()}
    fields = {name: kind if name in required else NotRequired[kind] for name, kind in kinds.items()}
    # A model would not do: its fields may not be called `copy`, `json` or `schema`.
    shape = TypedDict("run", fields)  # type: ignore[misc] # made at run time
    shape.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    try:
        if SLOT in kinds:
            TypeAdapter(kinds[SLOT]).validate_python(datetime(2026, 1, 1, 0, 0, 1, tzinfo=UTC))
        return TypeAdapter(shape)
    except ValidationError:
        raise InvalidTask("the parameter slot of run() is filled with a datetime: write `slot: datetime`") from None
    except (PydanticUserError, NameError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]  # what follows is advice that is of no use here
        raise InvalidTask(
            f"the parameters of run() can't be checked: {reason}; allowed: types that pydantic reads from JSON, "
            "such as str, int, date, list[str] or a model"
        ) from error
